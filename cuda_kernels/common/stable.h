// Tensors at the border of the CPU library: the libtorch stable ABI, so that one build serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "common/scalar.h"

namespace zoo::stable {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected a tensor of float64, float32, bfloat16 or float16");
  }
  return kFloat32;
}

inline ScalarType compute_scalar_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// A tensor of other sizes and type beside `like`, uninitialised.
inline Tensor new_like(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), type);
}
inline Tensor new_compute(const Tensor& like, std::initializer_list<int64_t> size) {
  return new_like(like, size, compute_scalar_type(like));
}

template <class S>
const S* input(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <class S>
S* output(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

// Calls body with a value of the tensor's storage type.
template <class Body>
void for_dtype(const Tensor& t, Body&& body) {
  switch (dtype_of(t)) {
    case kFloat32:
      return body(float{});
    case kFloat64:
      return body(double{});
    case kBFloat16:
      return body(bf16{});
    case kFloat16:
      return body(half{});
  }
}

}  // namespace zoo::stable
