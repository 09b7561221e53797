// The CUDA kernels and their launches as a module for Python, on a machine that tests make up (cuda_runtime.h): its
// addresses are those of tensors on the CPU.
#include <pybind11/pybind11.h>

#include "../../../csrc/cuda/bindings.h"
#include "cuda_runtime.h"

namespace py = pybind11;
using on_host::machine;
using on_host::Machine;

namespace {

const std::map<std::string, int Machine::*> kSettings = {
    {"devices", &Machine::devices},
    {"driver", &Machine::driver},
    {"runtime", &Machine::runtime},
    {"major", &Machine::major},
    {"minor", &Machine::minor},
    {"multiprocessors", &Machine::multiprocessors},
    {"shared_bytes", &Machine::shared_bytes},
    {"cluster_launch", &Machine::cluster_launch},
    {"active_clusters", &Machine::active_clusters},
    {"has_code", &Machine::has_code},
};

// What is not said is as at first, the current device 0, and no call fails.
void set_machine(const py::kwargs& settings) {
  Machine made;
  for (const auto& [name, value] : settings) {
    const auto setting = py::cast<std::string>(name);
    const auto found = kSettings.find(setting);
    if (found == kSettings.end()) throw py::type_error("set_machine: there is no setting " + setting);
    made.*found->second = py::cast<int>(value);
  }
  made.latest.count = machine.latest.count;
  machine = made;
  on_host::device = 0;
  on_host::last_error = cudaSuccess;
}

py::dict latest_launch() {
  const on_host::Launch& latest = machine.latest;
  return py::dict(py::arg("count") = latest.count, py::arg("device") = latest.device, py::arg("stream") = latest.stream,
                  py::arg("blocks") = latest.blocks, py::arg("cluster") = latest.cluster,
                  py::arg("threads") = latest.threads, py::arg("shared_bytes") = latest.shared_bytes,
                  py::arg("static_bytes") = latest.static_bytes, py::arg("carveout") = latest.carveout);
}

}  // namespace

PYBIND11_MODULE(gpu_on_host, m) {
  gspo::gpu::bind(m);
  m.def("set_machine", &set_machine);
  m.def("fail_next", [](const std::string& function, int error) { machine.fails[function] = error; },
        py::arg("function"), py::arg("error"));
  m.def("latest_launch", &latest_launch);
  m.def("current_device", [] { return on_host::device; });
  m.def("last_error", [] { return on_host::last_error; });  // that nobody has taken
}
