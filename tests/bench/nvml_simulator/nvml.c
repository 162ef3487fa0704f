/* A library with NVML's symbols that plays one card from a scenario file, for tests: the genuine pynvml loads it.

   HAVOC_NVML_SCENARIO names the file. It is read anew at every call, one "key value..." a line; a key that is not there
   is a reading this card does not support. Lines that may come more than once:

       process child BYTES [GROWTH_PER_MS]   the caller's own child process, whichever that is now ("na": not told)
       process host BYTES                    the same child under a number of the host, as a container sees it
       process PID BYTES                     somebody else
       after MS key value                    holds from MS milliseconds after the library was opened
       until MS key value                    holds until then

   It is found only by a search path, has no kernel driver beneath it and is not NVIDIA's: what is measured on it is
   simulated. */

#include <ctype.h>
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { HOST_OFFSET = 1 << 23, /* above every number Linux gives out */ LAST = -1, SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };
static const uint64_t NOT_AVAILABLE = ~(uint64_t)0;
static int64_t opened_ms, child_since_ms;
static int child_seen;
static unsigned told_pid; /* the number under which the child was listed last */
static int handle;

typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } Process;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory2;
typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} PciInfo;
typedef struct { unsigned gpu, memory; unsigned long long max_memory, time, start; unsigned running, reserved[5]; } Accounting;
typedef struct { unsigned version; unsigned sensor; int celsius; } Temperature;

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* Copy the rest of the index-th line that begins with key, of the last one for LAST; 0 when there is none. */
static int find(const char *key, int index, char *value, size_t size) {
    const char *path = getenv("HAVOC_NVML_SCENARIO");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    size_t length = strlen(key);
    int found = 0, seen = 0;
    while (file && fgets(line, sizeof line, file)) {
        char *text = line;
        long long from_ms;
        int used = 0;
        line[strcspn(line, "\r\n")] = 0;
        if (sscanf(text, "after %lld %n", &from_ms, &used) == 1 && used) {
            if (now_ms() - opened_ms < from_ms) continue;
            text += used;
        } else if (sscanf(text, "until %lld %n", &from_ms, &used) == 1 && used) {
            if (now_ms() - opened_ms >= from_ms) continue;
            text += used;
        }
        if (strncmp(text, key, length) || text[length] != ' ') continue;
        if (index != LAST && seen++ != index) continue;
        snprintf(value, size, "%s", text + length + 1);
        found = 1;
        if (index != LAST) break;
    }
    if (file) fclose(file);
    return found;
}

static int number(const char *key, unsigned long long *value) {
    char text[256];
    if (!find(key, LAST, text, sizeof text)) return 0;
    *value = strtoull(text, NULL, 0);
    return 1;
}

static int is_lost(void) {
    unsigned long long lost = 0;
    return number("lost", &lost) && lost;
}

/* The newest process whose parent is the caller, or 0. */
static unsigned child_pid(void) {
    DIR *folder = opendir("/proc");
    struct dirent *entry;
    unsigned newest = 0;
    while (folder && (entry = readdir(folder))) {
        char path[300], stat[512], *after;
        unsigned parent = 0;
        char state = 0;
        FILE *file;
        if (!isdigit((unsigned char)entry->d_name[0])) continue;
        snprintf(path, sizeof path, "/proc/%s/stat", entry->d_name);
        file = fopen(path, "r");
        if (!file) continue;
        if (fgets(stat, sizeof stat, file) && (after = strrchr(stat, ')')) &&
            sscanf(after + 1, " %c %u", &state, &parent) == 2 && parent == (unsigned)getpid() && state != 'Z') {
            unsigned pid = (unsigned)atoi(entry->d_name);
            if (pid > newest) newest = pid;
        }
        fclose(file);
    }
    if (folder) closedir(folder);
    if (newest && (int)newest != child_seen) child_seen = (int)newest, child_since_ms = now_ms();
    return newest;
}

static int processes(Process *list, int capacity) {
    char value[256];
    int count = 0;
    for (int index = 0; count < capacity && find("process", index, value, sizeof value); index++) {
        char who[64] = "", bytes[64] = "";
        unsigned long long growth = 0;
        sscanf(value, "%63s %63s %llu", who, bytes, &growth);
        unsigned pid = isdigit((unsigned char)who[0]) ? (unsigned)strtoul(who, NULL, 0) : child_pid();
        if (pid && !strcmp(who, "host")) pid += HOST_OFFSET;
        if (!pid) continue;
        if (!isdigit((unsigned char)who[0])) told_pid = pid;
        list[count].pid = pid;
        list[count].used = strcmp(bytes, "na") ? strtoull(bytes, NULL, 0) : NOT_AVAILABLE;
        if (growth) list[count].used += growth * (unsigned long long)(now_ms() - child_since_ms);
        list[count].gpu_instance = list[count].compute_instance = ~0u;
        count++;
    }
    return count;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (!opened_ms) opened_ms = now_ms();
    return SUCCESS;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) {
    return code == GPU_IS_LOST ? "GPU is lost" : code == NOT_SUPPORTED ? "Not Supported" : "Unknown Error";
}
int nvmlDeviceGetCount_v2(unsigned *count) { return *count = 1, SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { return (void)index, *device = &handle, SUCCESS; }

static int text(const char *key, char *value, unsigned size) {
    if (is_lost()) return GPU_IS_LOST;
    return find(key, LAST, value, size) ? SUCCESS : NOT_SUPPORTED;
}
int nvmlSystemGetDriverVersion(char *value, unsigned size) { return text("driver", value, size); }
int nvmlDeviceGetName(void *device, char *value, unsigned size) { return (void)device, text("name", value, size); }
int nvmlDeviceGetUUID(void *device, char *value, unsigned size) { return (void)device, text("uuid", value, size); }
int nvmlDeviceGetVbiosVersion(void *device, char *value, unsigned size) { return (void)device, text("vbios", value, size); }

static int plain(const char *key, unsigned *value) {
    unsigned long long wide;
    if (is_lost()) return GPU_IS_LOST;
    if (!number(key, &wide)) return NOT_SUPPORTED;
    return *value = (unsigned)wide, SUCCESS;
}
int nvmlDeviceGetMemoryBusWidth(void *d, unsigned *v) { return (void)d, plain("bus_width", v); }
int nvmlDeviceGetNumGpuCores(void *d, unsigned *v) { return (void)d, plain("num_cores", v); }
int nvmlDeviceGetPersistenceMode(void *d, unsigned *v) { return (void)d, plain("persistence", v); }
int nvmlDeviceGetPowerUsage(void *d, unsigned *v) { return (void)d, plain("power_mw", v); }
int nvmlDeviceGetEnforcedPowerLimit(void *d, unsigned *v) { return (void)d, plain("power_limit_mw", v); }
int nvmlDeviceGetAccountingMode(void *d, unsigned *v) { return (void)d, plain("accounting", v); }
int nvmlDeviceGetClockInfo(void *d, unsigned type, unsigned *v) {
    return (void)d, plain(type == 1 ? "sm_clock" : "memory_clock", v);
}
int nvmlDeviceGetMaxClockInfo(void *d, unsigned type, unsigned *v) {
    return (void)d, plain(type == 1 ? "max_sm_clock" : "max_memory_clock", v);
}
int nvmlDeviceGetTemperatureV(void *d, Temperature *t) {
    unsigned celsius;
    int code = plain("temperature", &celsius);
    if (!code) t->celsius = (int)celsius;
    return (void)d, code;
}
int nvmlDeviceGetCurrentClocksEventReasons(void *d, unsigned long long *mask) {
    (void)d;
    if (is_lost()) return GPU_IS_LOST;
    return number("throttle", mask) ? SUCCESS : NOT_SUPPORTED;
}
int nvmlDeviceGetTotalEnergyConsumption(void *d, unsigned long long *millijoules) {
    unsigned milliwatts;
    int code = plain("energy_mw", &milliwatts);
    if (!code) *millijoules = (unsigned long long)milliwatts * (unsigned long long)(now_ms() - opened_ms + 1) / 1000;
    return (void)d, code;
}
int nvmlDeviceGetCudaComputeCapability(void *d, int *major, int *minor) {
    char value[32];
    (void)d;
    if (is_lost()) return GPU_IS_LOST;
    return find("compute_capability", LAST, value, sizeof value) && sscanf(value, "%d.%d", major, minor) == 2 ? SUCCESS : NOT_SUPPORTED;
}
int nvmlDeviceGetPciInfo_v3(void *d, PciInfo *info) {
    unsigned device;
    int code = plain("pci_device_id", &device);
    memset(info, 0, sizeof *info);
    if (!code) info->pci_device_id = device << 16 | 0x10de;
    return (void)d, code;
}

static int memory(Memory2 *info) {
    unsigned long long total = 0, reserved = 0, idle = 0;
    Process list[32];
    int count = processes(list, 32);
    if (is_lost()) return GPU_IS_LOST;
    if (!number("memory_total", &total)) return NOT_SUPPORTED;
    number("memory_reserved", &reserved);
    number("memory_idle", &idle);
    for (int index = 0; index < count; index++) {
        unsigned long long hidden = 0;
        if (list[index].used != NOT_AVAILABLE) idle += list[index].used;
        else if (number("hidden_bytes", &hidden)) idle += hidden; /* held, but not told per process */
    }
    info->total = total, info->reserved = reserved, info->used = idle, info->free = total - reserved - idle;
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo_v2(void *d, Memory2 *info) {
    unsigned long long absent = 0;
    (void)d;
    return number("no_memory_v2", &absent) && absent ? NOT_SUPPORTED : memory(info);
}
int nvmlDeviceGetMemoryInfo(void *d, Memory *info) {
    Memory2 all = {0};
    int code = memory(&all);
    info->total = all.total, info->used = all.used + all.reserved, info->free = all.free; /* version 1 adds the reserve */
    return (void)d, code;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *count, Process *list) {
    unsigned long long absent = 0;
    Process own[32];
    int found = processes(own, 32);
    (void)d;
    if (is_lost()) return GPU_IS_LOST;
    if (number("no_process_list", &absent) && absent) return NOT_SUPPORTED;
    if (!found || (number("hide_processes", &absent) && absent)) return *count = 0, SUCCESS;
    if (!list || *count < (unsigned)found) return *count = (unsigned)found, INSUFFICIENT_SIZE;
    memcpy(list, own, (size_t)found * sizeof *own);
    return *count = (unsigned)found, SUCCESS;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *d, unsigned *count, Process *list) {
    return (void)d, (void)list, *count = 0, is_lost() ? GPU_IS_LOST : SUCCESS;
}
int nvmlDeviceGetAccountingStats(void *d, unsigned pid, Accounting *stats) {
    unsigned long long peak = 0;
    (void)d;
    memset(stats, 0, sizeof *stats);
    if (is_lost()) return GPU_IS_LOST;
    if (pid != told_pid) return NOT_FOUND;
    if (!number("accounted_peak", &peak)) return NOT_SUPPORTED;
    return stats->max_memory = peak, SUCCESS;
}
