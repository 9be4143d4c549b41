// An empty Python module: `import flash_attn._C` loads this library, and loading registers the ops.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
