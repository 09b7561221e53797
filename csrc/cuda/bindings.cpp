// The CUDA kernels as Python sees them: addresses of the device, sizes and a stream. rows/cuda_rows.py calls them.
#include "bindings.h"

#include "../row_arguments.h"
#include "rows.h"

namespace gspo::gpu {

namespace {

using python::Arguments;
using python::method;
using python::Released;

Measure measure_of(const std::string& name) {
  if (name == "ratio") return Measure::kRatio;
  if (name == "tv") return Measure::kTv;
  if (name == "kl") return Measure::kKl;
  throw std::invalid_argument("measure: expected 'ratio', 'tv' or 'kl'; got '" + name + "'");
}

Range range_of(Arguments& in, const char* name) {
  const auto [low, high] = in[name].items("low", "high");
  return {low.real(), high.real()};
}

TokenSlope slope_of(Arguments& in) {
  TokenSlope slope{};
  if (!in.has("old_logprobs")) return slope;  // on-policy
  slope.old_logprobs = in["old_logprobs"].address<const float>();
  slope.advantages = in["advantages"].address<const float>();
  slope.rollout_logprobs = in["rollout_logprobs"].address<const float>();
  slope.positive = range_of(in, "positive");
  slope.negative = range_of(in, "negative");
  slope.hold = in["hold"].boolean();
  slope.measure = measure_of(in["measure"].text());
  slope.max_weight = in["max_weight"].real();
  slope.penalty = in["penalty"].real();
  slope.max_log_ratio = in["max_log_ratio"].real();
  return slope;
}

void run_one_read(Arguments& in) {
  OneRead arguments{};
  const std::string dtype = in["dtype"].text();
  arguments.shape = shape_of(in);
  arguments.in = inputs_of(in, view_of(in, "logits"));
  arguments.out = outputs_of(in);
  arguments.upstream.logprobs = in["grad_logprobs"].address<const float>();
  arguments.common.factor = in["factor"].address<const float>();
  arguments.common.counts = in["counts"].address<const float>();
  arguments.common.count_size = in["count_size"].integer();
  arguments.slope = slope_of(in);
  arguments.gradient = view_of(in, "gradient");
  arguments.tickets = in["tickets"].address<unsigned>();
  const int device = in["device"].integer<int>();
  const auto stream = reinterpret_cast<uintptr_t>(in["stream"].address<void>());
  const Released released(in);
  one_read(dtype, arguments, device, stream);
}

std::string why_unavailable(Arguments& in) {
  const int device = in["device"].integer<int>();
  in.end();
  return unavailable_reason(device);
}

PyObject* names_of_variants() {
  PyObject* const list = PyList_New(0);
  if (!list) return nullptr;
  for (const std::string& name : variants()) {
    PyObject* const item = python::to_python(name);
    const bool failed = !item || PyList_Append(list, item);
    Py_XDECREF(item);
    if (failed) {
      Py_DECREF(list);
      return nullptr;
    }
  }
  return list;
}

void use_named_variant(Arguments& in) {
  const std::string name = in["name"].text();
  in.end();
  use_variant(name);
}

PyObject* layout_of(Arguments& in) {
  const std::string dtype = in["dtype"].text();
  const auto vocab = in["vocab"].integer(), rows = in["rows"].integer();
  const int device = in["device"].integer<int>();
  in.end();
  const Layout found = layout(dtype, vocab, rows, device);
  return Py_BuildValue("{s:N,s:I,s:I,s:I,s:n}", "resident", python::to_python(found.resident), "blocks", found.blocks,
                       "clusters", found.clusters, "threads", found.threads, "shared_bytes",
                       static_cast<Py_ssize_t>(found.shared_bytes));
}

}  // namespace

PyMethodDef kMethods[] = {
    method<&why_unavailable>("cuda_unavailable_reason"),
    method<&release>("cuda_release"),
    method<&names_of_variants>("cuda_variants"),
    method<&use_named_variant>("cuda_use_variant"),
    method<&layout_of>("cuda_layout"),
    method<&run_one_read>("cuda_one_read"),
    {},
};

}  // namespace gspo::gpu
