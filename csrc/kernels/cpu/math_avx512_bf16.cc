#include "kernels/cpu/math_avx512_bf16.h"

#include "kernels/cpu/attention_dot.h"
#include "kernels/cpu/math_loops.h"
#include "kernels/cpu/pointwise_loops.h"
#include "kernels/cpu/sampling_loops.h"

namespace nanoflow::cpu {

const LoopSet kLoopsAvx512Bf16{
    .f32 = {kPointwiseLoops<float>, kAttentionLoops<float>},
    .bf16 = {kPointwiseLoops<BFloat16>, kDotAttentionLoops},
    .f16 = {kPointwiseLoops<Float16>, kAttentionLoops<Float16>},
    .sampling = kSamplingLoops,
};

}  // namespace nanoflow::cpu
