/* The few symbols of the CUDA driver API that identify a card, from the scenario file of nvml.c: keys cuda_name,
   cuda_uuid (32 hexadecimal digits), cuda_memory, cuda_sms, cuda_cc, cuda_bus_width. Without cuda_name: no device. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NO_DEVICE = 100 };

static int find(const char *key, char *value, size_t size) {
    const char *path = getenv("HAVOC_NVML_SCENARIO");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    int found = 0;
    while (file && fgets(line, sizeof line, file)) {
        size_t length = strlen(key);
        line[strcspn(line, "\r\n")] = 0;
        if (strncmp(line, key, length) || line[length] != ' ') continue;
        snprintf(value, size, "%s", line + length + 1);
        found = 1;
    }
    if (file) fclose(file);
    return found;
}

int cuInit(unsigned flags) {
    char name[256];
    return (void)flags, find("cuda_name", name, sizeof name) ? SUCCESS : NO_DEVICE;
}
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cuDeviceGetName(char *name, int size, int device) {
    return (void)device, find("cuda_name", name, (size_t)size) ? SUCCESS : NO_DEVICE;
}
int cuDeviceGetUuid(unsigned char *uuid, int device) {
    char digits[128];
    (void)device;
    if (!find("cuda_uuid", digits, sizeof digits)) return NO_DEVICE;
    for (int index = 0; index < 16; index++) {
        unsigned value = 0;
        sscanf(digits + 2 * index, "%2x", &value);
        uuid[index] = (unsigned char)value;
    }
    return SUCCESS;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    char value[64];
    (void)device;
    if (!find("cuda_memory", value, sizeof value)) return NO_DEVICE;
    return *bytes = strtoull(value, NULL, 0), SUCCESS;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    char text[64];
    int major = 0, minor = 0;
    (void)device;
    if (attribute == 75 || attribute == 76) {
        if (!find("cuda_cc", text, sizeof text) || sscanf(text, "%d.%d", &major, &minor) != 2) return NO_DEVICE;
        return *value = attribute == 75 ? major : minor, SUCCESS;
    }
    if (!find(attribute == 16 ? "cuda_sms" : "cuda_bus_width", text, sizeof text)) return NO_DEVICE;
    return *value = atoi(text), SUCCESS;
}
