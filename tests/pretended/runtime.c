/* A stand-in for CUDA's runtime library, loaded before it: one GPU whose memory is the host's.
 *
 * Allocations and copies are real, kernels do nothing (gpu.py computes what they would have), and all that the host
 * would have to wait for is reported to whoever asked for it. What is not here is the real library's, and fails.
 * The layouts of structures differ between CUDA 12 and 13: they come from the headers of the installed packages.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define MOST_PINNED 65536
#define MEMORY ((size_t)64 << 30)
#define MULTIPROCESSORS 132

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { char *begin; size_t bytes; } pinned[MOST_PINNED];
static void (*report)(const char *why);
static size_t handles = 4096;

/* Call this function wherever the host would wait for the GPU. */
void pretended_report_waits(void (*function)(const char *why)) { report = function; }

static void waited(const char *why) {
    if (report) report(why);
}

/* The compute capability, 90 for sm_90. */
static int capability(void) {
    const char *text = getenv("PRETENDED_SM");
    return text ? atoi(text) : 90;
}

static void *new_handle(void) { return (void *)__atomic_add_fetch(&handles, 16, __ATOMIC_RELAXED); }

/* Memory ---------------------------------------------------------------------------------------------------------- */

/* What a GPU has allocated is not zero, but zeros are what kernels that do nothing may leave behind as a valid index. */
cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    size_t whole = (bytes + 512) / 512 * 512;
    *pointer = aligned_alloc(512, whole);
    if (!*pointer) return cudaErrorMemoryAllocation;
    memset(*pointer, 0, whole);
    return cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
    free(pointer);
    return cudaSuccess;
}

static void set_pinned(void *begin, size_t bytes) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST_PINNED; i++) {
        if (pinned[i].begin) continue;
        pinned[i].begin = begin;
        pinned[i].bytes = bytes;
        break;
    }
    pthread_mutex_unlock(&lock);
}

static void unset_pinned(void *begin) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST_PINNED; i++)
        if (pinned[i].begin == begin) pinned[i].begin = NULL;
    pthread_mutex_unlock(&lock);
}

static int is_pinned(const void *pointer) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST_PINNED && !found; i++)
        found = pinned[i].begin && (char *)pointer >= pinned[i].begin && (char *)pointer < pinned[i].begin + pinned[i].bytes;
    pthread_mutex_unlock(&lock);
    return found;
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned int flags) {
    cudaError_t error = cudaMalloc(pointer, bytes);
    if (!error) set_pinned(*pointer, bytes + 1);
    return error;
}

cudaError_t cudaFreeHost(void *pointer) {
    unset_pinned(pointer);
    return cudaFree(pointer);
}

cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned int flags) {
    set_pinned(pointer, bytes);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *pointer) {
    unset_pinned(pointer);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = is_pinned(pointer) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    *left = *total = MEMORY;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    waited("cudaMemcpy");
    memmove(to, from, bytes);
    return cudaSuccess;
}

/* Copies from and to memory that is not pinned make the host wait, whatever they are called. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    const void *host = kind == cudaMemcpyHostToDevice ? from : kind == cudaMemcpyDeviceToHost ? to : NULL;
    if (host && bytes && !is_pinned(host)) waited("a copy from or to memory that is not pinned");
    memmove(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    memset(to, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    return cudaMemset(to, value, bytes);
}

/* Waiting --------------------------------------------------------------------------------------------------------- */

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    waited("cudaStreamSynchronize");
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    waited("cudaDeviceSynchronize");
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    waited("cudaEventSynchronize");
    return cudaSuccess;
}

/* The device ------------------------------------------------------------------------------------------------------ */

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "pretended GPU");
    properties->major = capability() / 10;
    properties->minor = capability() % 10;
    properties->totalGlobalMem = MEMORY;
    properties->multiProcessorCount = MULTIPROCESSORS;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->regsPerMultiprocessor = 65536;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = 96 << 10;
    properties->sharedMemPerMultiprocessor = 96 << 10;
    properties->l2CacheSize = 6 << 20;
    for (int i = 0; i < 3; i++) {
        properties->maxThreadsDim[i] = i < 2 ? 1024 : 64;
        properties->maxGridSize[i] = i ? 65535 : 2147483647;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor   ? capability() / 10
             : attribute == cudaDevAttrComputeCapabilityMinor ? capability() % 10
             : attribute == cudaDevAttrMultiProcessorCount    ? MULTIPROCESSORS
                                                              : 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int other) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

/* Streams and events ---------------------------------------------------------------------------------------------- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned int flags, int priority) {
    *stream = new_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies,
#if CUDART_VERSION >= 13000
    const cudaGraphEdgeData **edges,
#endif
    size_t *count
) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags) {
    *event = new_handle();
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    *milliseconds = 1;
    return cudaSuccess;
}

/* Kernels --------------------------------------------------------------------------------------------------------- */

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->ptxVersion = attributes->binaryVersion = capability();
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int size, size_t shared, unsigned int flags
) {
    *blocks = 2;
    return cudaSuccess;
}
