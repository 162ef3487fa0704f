/* The functions of Windows' pdh.dll that list what processes hold on graphics cards. HAVOC_PDH names a file with lines
   "INSTANCE DEDICATED SHARED"; it is read at every collection. Without it there are no such counters. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <wchar.h>

typedef struct { uint32_t status; int64_t large; } Value;
typedef struct { wchar_t *name; Value value; } Item;
enum { MOST = 32, LENGTH = 96 };
static const uint32_t MORE_DATA = 0x800007D2u, NO_OBJECT = 0xC0000BB8u;
static wchar_t names[MOST][LENGTH];
static int64_t bytes[MOST][2];
static uint32_t count;

uint32_t PdhOpenQueryW(const wchar_t *source, void *user, void **query) {
    return (void)source, (void)user, *query = &count, 0;
}
uint32_t PdhCloseQuery(void *query) { return (void)query, 0; }
uint32_t PdhAddEnglishCounterW(void *query, const wchar_t *path, void *user, void **counter) {
    (void)query, (void)user;
    if (!getenv("HAVOC_PDH")) return NO_OBJECT;
    *counter = (void *)(intptr_t)(wcsstr(path, L"\\Shared Usage") ? 2 : 1);
    return 0;
}
uint32_t PdhCollectQueryData(void *query) {
    FILE *file = fopen(getenv("HAVOC_PDH"), "r");
    char name[LENGTH];
    long long dedicated, shared;
    (void)query;
    for (count = 0; file && count < MOST && fscanf(file, "%95s %lld %lld", name, &dedicated, &shared) == 3; count++) {
        mbstowcs(names[count], name, LENGTH);
        bytes[count][0] = dedicated, bytes[count][1] = shared;
    }
    if (file) fclose(file);
    return file ? 0 : NO_OBJECT;
}
uint32_t PdhGetFormattedCounterArrayW(void *counter, uint32_t format, uint32_t *size, uint32_t *items, Item *list) {
    uint32_t needed = count * (uint32_t)sizeof(Item);
    (void)format;
    if (!list || *size < needed) return *size = needed, *items = count, MORE_DATA;
    for (uint32_t index = 0; index < count; index++) {
        list[index].name = names[index];
        list[index].value.status = bytes[index][0] < 0; /* an invalid instance */
        list[index].value.large = bytes[index][(intptr_t)counter - 1];
    }
    return *items = count, 0;
}
