// fastpeft._C and fastpeft._C_cuda: empty Python modules. Loading one registers its implementations with PyTorch's
// dispatcher.
#include <Python.h>

#define FASTPEFT_JOIN(a, b) a##b
#define FASTPEFT_INIT(name) FASTPEFT_JOIN(PyInit_, name)
#define FASTPEFT_TEXT(name) #name
#define FASTPEFT_NAME(name) FASTPEFT_TEXT(name)

// torch's build defines TORCH_EXTENSION_NAME
extern "C" PyMODINIT_FUNC FASTPEFT_INIT(TORCH_EXTENSION_NAME)(void) {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                     FASTPEFT_NAME(TORCH_EXTENSION_NAME),
                                     nullptr,
                                     -1,
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     nullptr};
    return PyModule_Create(&definition);
}
