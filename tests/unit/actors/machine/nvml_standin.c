/* A stand-in for the driver's libnvidia-ml.so.1: it answers what machine.h says, which tests/unit/nvml_standin.py
   writes, so that the real NVML bindings run without a GPU. */
#include <stddef.h>
#include <string.h>

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
enum { NO_MIG = -1 };

struct part { const char *uuid, *name; unsigned long long total, free; };
struct gpu { struct part whole; int major, minor, mode, mig, instances; struct part instance[7]; };

#include "machine.h" /* INIT, DRIVER, CUDA, COUNT, gpus[], peers() */

struct memory { unsigned long long total, free, used; };

/* A handle is the address of a part; the first of each GPU is its whole. */
static const struct gpu *gpu_of(const void *handle)
{
    for (int at = 0; at < COUNT; at++)
        if (handle >= (const void *)&gpus[at] && handle < (const void *)(&gpus[at] + 1))
            return &gpus[at];
    return NULL;
}

int nvmlInitWithFlags(unsigned flags) { return INIT; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == 18 ? "Driver/library version mismatch" : "Some error"; }

static int text(char *out, unsigned room, const char *value)
{
    strncpy(out, value, room);
    return OK;
}

int nvmlSystemGetDriverVersion(char *out, unsigned room) { return text(out, room, DRIVER); }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = CUDA; return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = COUNT; return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned at, const void **handle)
{
    if (at >= COUNT)
        return INVALID_ARGUMENT;
    *handle = &gpus[at].whole;
    return OK;
}

int nvmlDeviceGetUUID(const struct part *part, char *out, unsigned room) { return text(out, room, part->uuid); }
int nvmlDeviceGetName(const struct part *part, char *out, unsigned room) { return text(out, room, part->name); }

int nvmlDeviceGetMemoryInfo(const struct part *part, struct memory *memory)
{
    if (!part->total) /* unified memory */
        return NOT_SUPPORTED;
    *memory = (struct memory){part->total, part->free, part->total - part->free};
    return OK;
}

int nvmlDeviceGetCudaComputeCapability(const void *handle, int *major, int *minor)
{
    *major = gpu_of(handle)->major;
    *minor = gpu_of(handle)->minor;
    return OK;
}

int nvmlDeviceGetComputeMode(const void *handle, int *mode) { *mode = gpu_of(handle)->mode; return OK; }

int nvmlDeviceGetMigMode(const void *handle, unsigned *current, unsigned *pending)
{
    if (gpu_of(handle)->mig == NO_MIG)
        return NOT_SUPPORTED;
    *current = *pending = gpu_of(handle)->mig;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(const void *handle, unsigned *count) { *count = 7; return OK; }

int nvmlDeviceGetMigDeviceHandleByIndex(const void *handle, unsigned at, const void **instance)
{
    const struct gpu *gpu = gpu_of(handle);
    if ((int)at >= gpu->instances || !gpu->instance[at].uuid) /* numbers may have gaps */
        return NOT_FOUND;
    *instance = &gpu->instance[at];
    return OK;
}

int nvmlDeviceGetP2PStatus(const void *one, const void *two, int index, int *status)
{
    *status = peers(gpu_of(one) - gpus, gpu_of(two) - gpus) ? 0 : 1;
    return OK;
}
