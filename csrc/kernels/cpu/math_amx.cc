#include "kernels/cpu/math_amx.h"

#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/math_loops.h"
#include "kernels/cpu/pointwise_loops.h"
#include "kernels/cpu/sampling_loops.h"

namespace nanoflow::cpu {

const LoopSet kLoopsAmx{
    .f32 = {kPointwiseLoops<float>, kAttentionLoops<float>},
    .bf16 = {kPointwiseLoops<BFloat16>, kTileAttentionLoops},
    .f16 = {kPointwiseLoops<Float16>, kAttentionLoops<Float16>},
    .sampling = kSamplingLoops,
};

}  // namespace nanoflow::cpu
