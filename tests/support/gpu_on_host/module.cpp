// The CUDA kernels and their launches as a module for Python, on a machine that tests make up (cuda_runtime.h): its
// addresses are those of tensors on the CPU.
#include "../../../csrc/cuda/bindings.h"
#include "cuda_runtime.h"

using gspo::python::Arguments;
using gspo::python::method;
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
void set_machine(Arguments& in) {
  Machine made;
  for (const auto& [name, setting] : kSettings)
    if (in.has(name.c_str())) made.*setting = in[name.c_str()].integer<int>();
  in.end();
  made.latest.count = machine.latest.count;
  machine = made;
  on_host::device = 0;
  on_host::last_error = cudaSuccess;
}

void fail_next(Arguments& in) {
  const std::string function = in["function"].text();
  machine.fails[function] = in["error"].integer<int>();
}

PyObject* latest_launch() {
  const on_host::Launch& latest = machine.latest;
  const std::pair<const char*, int64_t> fields[] = {
      {"count", latest.count},
      {"device", latest.device},
      {"stream", latest.stream},
      {"blocks", latest.blocks},
      {"cluster", latest.cluster},
      {"threads", latest.threads},
      {"shared_bytes", latest.shared_bytes},
      {"static_bytes", latest.static_bytes},
      {"carveout", latest.carveout},
  };
  PyObject* const found = PyDict_New();
  for (const auto& [name, value] : fields) {
    PyObject* const number = PyLong_FromLongLong(value);
    PyDict_SetItemString(found, name, number);
    Py_DECREF(number);
  }
  return found;
}

PyObject* current_device() { return PyLong_FromLong(on_host::device); }
PyObject* last_error() { return PyLong_FromLong(on_host::last_error); }  // that nobody has taken

PyMethodDef kHostMethods[] = {
    method<&set_machine>("set_machine"),
    method<&fail_next>("fail_next"),
    method<&latest_launch>("latest_launch"),
    method<&current_device>("current_device"),
    method<&last_error>("last_error"),
    {},
};

int fill(PyObject* module) {
  return PyModule_AddFunctions(module, gspo::gpu::kMethods) || PyModule_AddFunctions(module, kHostMethods) ? -1 : 0;
}

}  // namespace

PyMODINIT_FUNC PyInit_gpu_on_host() {
  static gspo::python::Module module("gpu_on_host", "csrc/cuda on this machine.", &fill);
  return module.start();
}
