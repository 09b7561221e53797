// The CUDA kernels as Python sees them: addresses of the device, sizes and a stream. rows/cuda_rows.py calls them.
#include "bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>

#include "rows.h"

namespace py = pybind11;

namespace gspo::gpu {

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct View {  // [outer, inner, vocab] numbers
  uintptr_t address;
  int64_t outer_stride, inner_stride;
  LogitsView view() const { return {pointer<char>(address), outer_stride, inner_stride}; }
};

using Bounds = std::pair<double, double>;

Measure measure_of(const std::string& name) {
  if (name == "ratio") return Measure::kRatio;
  if (name == "tv") return Measure::kTv;
  if (name == "kl") return Measure::kKl;
  throw std::invalid_argument("measure: expected 'ratio', 'tv' or 'kl'; got '" + name + "'");
}

}  // namespace

void bind(py::module_& m) {
  m.def("cuda_unavailable_reason", &unavailable_reason, py::arg("device"));
  m.def("cuda_release", &release);
  m.def("cuda_variants", &variants);
  m.def("cuda_use_variant", &use_variant, py::arg("name"));
  m.def(
      "cuda_layout",
      [](const std::string& dtype, int64_t vocab, int64_t rows, int device) {
        const Layout found = layout(dtype, vocab, rows, device);
        return py::dict(py::arg("resident") = found.resident, py::arg("blocks") = found.blocks,
                        py::arg("clusters") = found.clusters, py::arg("threads") = found.threads,
                        py::arg("shared_bytes") = found.shared_bytes);
      },
      py::kw_only(), py::arg("dtype"), py::arg("vocab"), py::arg("rows"), py::arg("device"));

  using released = py::call_guard<py::gil_scoped_release>;
  py::class_<View>(m, "View", py::module_local()).def(py::init<uintptr_t, int64_t, int64_t>(), py::arg("address"),
                                  py::arg("outer_stride"), py::arg("inner_stride"));
  py::class_<TokenSlope>(m, "TokenSlope", py::module_local())
      .def(py::init([](uintptr_t old_logprobs, uintptr_t advantages, uintptr_t rollout_logprobs, Bounds positive,
                       Bounds negative, bool hold, const std::string& measure, double max_weight, double penalty,
                       double max_log_ratio) {
             return TokenSlope{pointer<const float>(old_logprobs),
                               pointer<const float>(advantages),
                               pointer<const float>(rollout_logprobs),
                               {positive.first, positive.second},
                               {negative.first, negative.second},
                               hold,
                               measure_of(measure),
                               max_weight,
                               penalty,
                               max_log_ratio};
           }),
           py::kw_only(), py::arg("old_logprobs"), py::arg("advantages"), py::arg("rollout_logprobs"),
           py::arg("positive"), py::arg("negative"), py::arg("hold"), py::arg("measure"), py::arg("max_weight"),
           py::arg("penalty"), py::arg("max_log_ratio"))
      .def(py::init<>());  // on-policy
  m.def(
      "cuda_one_read",
      [](const std::string& dtype, const View& logits, int64_t outer, int64_t inner, int64_t vocab, uintptr_t token_ids,
         uintptr_t mask, double temperature, uintptr_t row_temperature, double tanh_scale, uintptr_t logprobs,
         uintptr_t entropy, uintptr_t lse, uintptr_t grad_logprobs, uintptr_t factor, uintptr_t counts, int64_t count_size,
         const TokenSlope& slope, const View& gradient, uintptr_t tickets, int device, uintptr_t stream) {
        OneRead arguments{};
        arguments.shape = {outer * inner, inner, vocab};
        arguments.in = {logits.view(), pointer<const int64_t>(token_ids), pointer<const bool>(mask),
                        pointer<const float>(row_temperature), temperature, nullptr, tanh_scale};
        arguments.out = {pointer<float>(logprobs), pointer<float>(entropy), pointer<double>(lse)};
        arguments.upstream = {pointer<const float>(grad_logprobs), nullptr, nullptr};
        arguments.common = {pointer<const float>(factor), pointer<const float>(counts), count_size};
        arguments.slope = slope;
        arguments.gradient = gradient.view();
        arguments.tickets = pointer<unsigned>(tickets);
        one_read(dtype, arguments, device, stream);
      },
      released(), py::kw_only(), py::arg("dtype"), py::arg("logits"), py::arg("outer"), py::arg("inner"),
      py::arg("vocab"), py::arg("token_ids"), py::arg("mask"), py::arg("temperature"), py::arg("row_temperature"),
      py::arg("tanh_scale"), py::arg("logprobs"), py::arg("entropy"), py::arg("lse"), py::arg("grad_logprobs"),
      py::arg("factor"), py::arg("counts"), py::arg("count_size"), py::arg("slope"), py::arg("gradient"),
      py::arg("tickets"), py::arg("device"), py::arg("stream"));
}

}  // namespace gspo::gpu
