// Functions for Python, in its stable ABI (https://docs.python.org/3/c-api/stable.html): one build serves every Python
// from 3.10 on. Arguments are passed by name.
//
//     void scale(Arguments& in) {
//       float* numbers = in["numbers"].address<float>();
//       const int64_t count = in["count"].integer();
//       const Released released(in);  // other Python threads run meanwhile
//       ...
//     }
//     PyMethodDef kMethods[] = {method<&scale>("scale"), {}};
//
// An argument that is absent, unknown or of another type is a TypeError in Python. Other exceptions: see `call`.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace gspo::python {

struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One argument. Its methods convert it; they convert nothing silently, such as a float to an integer.
class Value {
 public:
  Value(const char* name, PyObject* object, const char* item = nullptr) : name_(name), object_(object), item_(item) {}

  template <class T = int64_t>
  T integer() const {
    if (!PyLong_Check(object_)) refuse("an int");
    int overflow;
    const int64_t found = PyLong_AsLongLongAndOverflow(object_, &overflow);
    if (overflow || found < std::numeric_limits<T>::min() || found > std::numeric_limits<T>::max())
      throw std::invalid_argument(label() + ": expected an int of " + std::to_string(8 * sizeof(T)) + " bits");
    return static_cast<T>(found);
  }

  template <class T>
  T* address() const {  // 0: a null pointer
    if (!PyLong_Check(object_)) refuse("an address (an int)");
    const unsigned long long found = PyLong_AsUnsignedLongLong(object_);
    if (found == static_cast<unsigned long long>(-1) && PyErr_Occurred()) {
      PyErr_Clear();
      throw std::invalid_argument(label() + ": expected an address; got an int below 0 or above 2**64 - 1");
    }
    return reinterpret_cast<T*>(static_cast<uintptr_t>(found));
  }

  double real() const {
    if (!PyFloat_Check(object_) && !PyLong_Check(object_)) refuse("a float");
    const double found = PyFloat_AsDouble(object_);
    if (found == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      throw std::invalid_argument(label() + ": expected a float; got an int that is too large for one");
    }
    return found;
  }

  bool boolean() const {
    if (!PyBool_Check(object_)) refuse("a bool");
    return object_ == Py_True;
  }

  std::string text() const {
    Py_ssize_t size;
    const char* found = PyUnicode_Check(object_) ? PyUnicode_AsUTF8AndSize(object_, &size) : nullptr;
    if (!found) refuse("a str");
    return std::string(found, size);
  }

  // The items of a tuple; errors name them.
  template <class... Name>
  auto items(const Name*... names) const {
    constexpr Py_ssize_t kCount = sizeof...(names);
    if (!PyTuple_Check(object_) || PyTuple_Size(object_) != kCount) {
      std::string listed;
      ((listed += (listed.empty() ? "" : ", ") + std::string(names)), ...);
      refuse("a tuple (" + listed + ")");
    }
    Py_ssize_t i = 0;  // braces are evaluated from left to right
    return std::array<Value, kCount>{Value(name_, PyTuple_GetItem(object_, i++), names)...};
  }

 private:
  std::string label() const { return item_ ? std::string(name_) + ", " + item_ : name_; }

  [[noreturn]] void refuse(const std::string& expected) const {
    PyErr_Clear();
    std::string got = "another type";
    if (PyTuple_Check(object_)) {
      got = "a tuple of " + std::to_string(PyTuple_Size(object_));
    } else if (PyObject* const type = PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object_)), "__name__")) {
      if (const char* const name = PyUnicode_AsUTF8AndSize(type, nullptr)) got = name;
      Py_DECREF(type);
    }
    PyErr_Clear();
    throw TypeError(label() + ": expected " + expected + "; got " + got);
  }

  const char* name_;
  PyObject* object_;  // the caller holds it
  const char* item_;  // of a tuple
};

class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t positional, PyObject* names)
      : values_(values), names_(names), count_(names ? PyTuple_Size(names) : 0) {
    if (positional) throw TypeError("arguments are passed by name");
    if (count_ > kMost) throw TypeError("too many arguments");
  }

  Value operator[](const char* name) {
    const Py_ssize_t found = find(name);
    if (found == count_) throw TypeError(std::string("missing argument: ") + name);
    read_ |= uint64_t{1} << found;
    next_ = found + 1;
    return Value(name, values_[found]);
  }

  bool has(const char* name) const { return find(name) != count_; }

  // To be called when all have been read: others are unknown.
  void end() const {
    for (Py_ssize_t i = 0; i < count_; ++i) {
      if (read_ >> i & 1) continue;
      const char* name = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(names_, i), nullptr);
      PyErr_Clear();
      throw TypeError(std::string("unknown argument: ") + (name ? name : "?"));
    }
  }

 private:
  static constexpr Py_ssize_t kMost = 64;  // bits of read_

  // Starts after the argument that was read last: callers mostly pass them in the order in which they are read.
  Py_ssize_t find(const char* name) const {
    for (Py_ssize_t i = 0; i < count_; ++i) {
      const Py_ssize_t at = next_ + i < count_ ? next_ + i : next_ + i - count_;
      if (PyUnicode_CompareWithASCIIString(PyTuple_GetItem(names_, at), name) == 0) return at;
    }
    return count_;
  }

  PyObject* const* values_;
  PyObject* names_;
  Py_ssize_t count_, next_ = 0;
  uint64_t read_ = 0;
};

// Other Python threads run while it lives. No Python object may be touched, so all arguments must have been read.
// Once Python has begun to exit, PyEval_RestoreThread ends a daemon thread: glibc unwinds the thread's stack for that,
// and stops the process at a function that is noexcept.
class Released {
 public:
  explicit Released(const Arguments& in) {
    in.end();
    state_ = PyEval_SaveThread();
  }
  ~Released() noexcept(false) { PyEval_RestoreThread(state_); }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  PyThreadState* state_;
};

inline PyObject* to_python(bool value) { return PyBool_FromLong(value); }
inline PyObject* to_python(const std::string& text) { return PyUnicode_FromStringAndSize(text.data(), text.size()); }
inline PyObject* to_python(PyObject* made) { return made; }

// Exceptions become Python's: invalid_argument a ValueError, bad_alloc a MemoryError, others a RuntimeError. Not
// noexcept: see Released.
template <auto function>
PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  try {
    Arguments in(values, positional, names);
    if constexpr (!std::is_invocable_v<decltype(function), Arguments&>) {
      in.end();
      return to_python(function());
    } else if constexpr (std::is_void_v<std::invoke_result_t<decltype(function), Arguments&>>) {
      function(in);
      Py_RETURN_NONE;
    } else {
      return to_python(function(in));
    }
  } catch (const TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A function of the module: `function` takes Arguments&, or nothing.
template <auto function>
PyMethodDef method(const char* name) {
  const auto called = reinterpret_cast<void (*)()>(&call<function>);  // a step that compilers do not warn of
  return {name, reinterpret_cast<PyCFunction>(called), METH_FASTCALL | METH_KEYWORDS, nullptr};
}

// The module that a PyInit function returns. `fill` adds its functions and returns 0, or -1 with Python's error set.
class Module {
 public:
  Module(const char* name, const char* documentation, int (*fill)(PyObject*)) {
    slots_[0] = {Py_mod_exec, reinterpret_cast<void*>(fill)};
#if defined(Py_GIL_DISABLED)
    slots_[1] = {Py_mod_gil, Py_MOD_GIL_NOT_USED};
#endif
    definition_.m_name = name;
    definition_.m_doc = documentation;
    definition_.m_slots = slots_;
  }

  PyObject* start() { return PyModuleDef_Init(&definition_); }

 private:
  PyModuleDef_Slot slots_[3] = {};
  PyModuleDef definition_ = {PyModuleDef_HEAD_INIT, nullptr, nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
};

}  // namespace gspo::python
