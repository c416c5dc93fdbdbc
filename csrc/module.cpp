// fastpeft._C: an empty Python module. Loading it registers the C++ implementations with PyTorch's dispatcher.
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C(void) {
    static PyModuleDef definition = {
        PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&definition);
}
