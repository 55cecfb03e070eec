// A plain C interface to the CUDA kernels, for bench/cuda/kernels.py and the GPU tests: memory and
// streams come from the caller. Functions return null, or a message that is valid until the
// thread's next call.

#include <exception>
#include <string>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/gemm_sm90.h"

using namespace nanoflow;
using namespace nanoflow::cuda;

namespace {

thread_local std::string last_error;

template <class Fn>
const char* guarded(Fn&& fn) {
  try {
    fn();
    return nullptr;
  } catch (const std::exception& error) {
    last_error = error.what();
    return last_error.c_str();
  }
}

GemmType type_of(int x_dtype, int out_dtype, int is_silu_mul) {
  return {.x = static_cast<DType>(x_dtype),
          .out = static_cast<DType>(out_dtype),
          .is_silu_mul = is_silu_mul != 0};
}

}  // namespace

extern "C" {

int nf_gemm_kernels() { return kNumGemmKernels; }

const char* nf_gemm_name(int kernel) {
  return traits_of(static_cast<GemmKernel>(kernel)).name.data();
}

int nf_choose_gemm(int rows, int features, int depth, int sms, int x_dtype, int out_dtype,
                   int is_silu_mul) {
  return static_cast<int>(
      choose_gemm({rows, features, depth}, sms, type_of(x_dtype, out_dtype, is_silu_mul)));
}

const char* nf_gemm(int kernel, int x_dtype, int out_dtype, int is_silu_mul,
                    const GemmArguments* arguments) {
  return guarded([&] {
    const GemmLauncher launch =
        gemm_launcher(static_cast<GemmKernel>(kernel), type_of(x_dtype, out_dtype, is_silu_mul));
    NF_CHECK(launch != nullptr, "there is no kernel ", nf_gemm_name(kernel), " for this type");
    launch(*arguments);
  });
}

size_t nf_attention_work_bytes(int requests, int rows, int group, int kv_heads, int ctas) {
  return attention_work_bytes(requests, rows, group, kv_heads, ctas);
}

const char* nf_plan_attention(const AttentionPlanArguments* arguments) {
  return guarded([&] { launch_attention_plan(*arguments); });
}

const char* nf_attention(int head_dim, int dtype, const AttentionArguments* arguments) {
  return guarded([&] {
    const AttentionLauncher launch = attention_launcher(head_dim);
    NF_CHECK(launch != nullptr, head_dim_problem(head_dim));
    launch(*arguments, static_cast<DType>(dtype));
  });
}

}  // extern "C"
