/* A stand-in for CUDA's driver, libcuda.so.1, as far as PyTorch asks it anything beside what runtime.c answers: whether
 * the device has a context.
 */
#include <stddef.h>

int cuInit(unsigned int flags) { return 0; }

int cuDevicePrimaryCtxGetState(int device, unsigned int *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}

int cuCtxGetCurrent(void **context) {
    *context = (void *)1;
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = "no driver here";
    return 0;
}
