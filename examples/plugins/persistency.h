/* The guest library for C: all that a plugin needs to speak with a persistency.plugins.PluginHost, in this one file.

   Copy it beside your plugin. It needs no C library. `import` and `export` are attributes that clang knows, and so does
   the clang within Zig:

       clang --target=wasm32 -Os -nostdlib -Wl,--no-entry,-z,stack-size=65536 -o plugin.wasm plugin.c
       python -m ziglang cc -target wasm32-freestanding -Os -nostdlib -Wl,--no-entry,-z,stack-size=65536 -o plugin.wasm plugin.c

   A function that the host can call:

       #include "persistency.h"

       PERSISTENCY_EXPORT(greet) int64_t greet(const uint8_t *data, uint32_t size)
       {
           persistency_bytes name = persistency_bytes_of(data, size);
           return persistency_answer(persistency_joined(persistency_text("hello, "), name));
       }

   Rules:
     1. Every function of the host gives 0 or more as its answer, or one of the error numbers below.
     2. Every call has a fresh instance: nothing that isn't in the store is there the next time, and nothing needs to be
        freed.
     3. What can't be had because the memory limit is reached ends the call, by a trap.
     4. Only the functions that a plugin uses become imports of it, and only those must be granted.

   Everything it is about is in docs/plugin-abi.md. */

#ifndef PERSISTENCY_H
#define PERSISTENCY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* -- the numbers -------------------------------------------------------------------------------------------------- */

/* What a function of the host returns instead of an answer. */
#define PERSISTENCY_NOT_FOUND (-1) /* there is no such key */
#define PERSISTENCY_TOO_SMALL (-2) /* the room isn't enough even for the first key of a page */
#define PERSISTENCY_QUOTA (-3)     /* it would take the plugin over its quota, of bytes or of keys; nothing has changed */
#define PERSISTENCY_INVALID (-4)   /* a key, a prefix, a time to live that isn't allowed */
#define PERSISTENCY_CLOSED (-5)    /* the store is closed: the plugin is being unloaded */
#define PERSISTENCY_STORAGE (-6)   /* the disk, the file, or the host itself failed */
#define PERSISTENCY_FAULT (-7)     /* a pointer or length outside this plugin's memory */
#define PERSISTENCY_DENIED (-8)    /* the key or prefix isn't within the prefix that was granted */
#define PERSISTENCY_TIMEOUT (-9)   /* no answer before the end of the call */

/* What a plugin's function returns instead of an answer. */
#define PERSISTENCY_FAILED (-1)
#define PERSISTENCY_NOT_IMPLEMENTED (-2)

#define PERSISTENCY_ABSENT 0xFFFFFFFFu /* as a length: no value at all, where an empty one would have length 0 */
#define PERSISTENCY_KEYS_PER_CALL_MAX 1000
#define PERSISTENCY_TEXT_BYTES_MAX 4096 /* of what is said with `fail`, and told by `last_error` */

/* -- imports and exports ------------------------------------------------------------------------------------------ */

#define PERSISTENCY_EXPORT(name) __attribute__((export_name(#name)))
#define PERSISTENCY_IMPORT(name) __attribute__((import_module("persistency"), import_name(#name)))
/* So that several files of one plugin may include this one. */
#define PERSISTENCY_SHARED __attribute__((weak))

PERSISTENCY_IMPORT(last_error) int64_t persistency_host_last_error(void *room, uint32_t room_len);
PERSISTENCY_IMPORT(fail) int64_t persistency_host_fail(const void *text, uint32_t text_len);
PERSISTENCY_IMPORT(kv_set)
int64_t persistency_host_kv_set(const void *key, uint32_t key_len, const void *value, uint32_t value_len);
PERSISTENCY_IMPORT(kv_set_with_ttl)
int64_t persistency_host_kv_set_with_ttl(
    const void *key, uint32_t key_len, const void *value, uint32_t value_len, int64_t ttl_ms);
PERSISTENCY_IMPORT(kv_get)
int64_t persistency_host_kv_get(const void *key, uint32_t key_len, void *room, uint32_t room_len);
PERSISTENCY_IMPORT(kv_get_many)
int64_t persistency_host_kv_get_many(const void *keys, uint32_t keys_len, void *room, uint32_t room_len);
PERSISTENCY_IMPORT(kv_has) int64_t persistency_host_kv_has(const void *key, uint32_t key_len);
PERSISTENCY_IMPORT(kv_list)
int64_t persistency_host_kv_list(const void *prefix, uint32_t prefix_len, const void *after, uint32_t after_len,
    void *room, uint32_t room_len);
PERSISTENCY_IMPORT(kv_delete) int64_t persistency_host_kv_delete(const void *key, uint32_t key_len);
PERSISTENCY_IMPORT(kv_delete_by_prefix)
int64_t persistency_host_kv_delete_by_prefix(const void *prefix, uint32_t prefix_len);
PERSISTENCY_IMPORT(kv_storage_used) int64_t persistency_host_kv_storage_used(void);
PERSISTENCY_IMPORT(kv_compare_and_set)
int64_t persistency_host_kv_compare_and_set(const void *key, uint32_t key_len, const void *expected,
    uint32_t expected_len, const void *desired, uint32_t desired_len);

/* -- memory ------------------------------------------------------------------------------------------------------- */

#ifdef PERSISTENCY_OWN_ALLOC

/* The plugin defines this one itself: `size` bytes, or NULL if there is no room. The host calls it, too. */
PERSISTENCY_EXPORT(alloc) void *persistency_alloc(uint32_t size);

#else

extern uint8_t __heap_base; /* the linker's: where the free memory begins */
PERSISTENCY_SHARED uintptr_t persistency_heap_end = 0;

/* `size` bytes, or NULL if the plugin's memory limit is reached. The host calls it for what it passes to a function. */
PERSISTENCY_SHARED PERSISTENCY_EXPORT(alloc) void *persistency_alloc(uint32_t size)
{
    uint64_t begin = persistency_heap_end ? persistency_heap_end : (uintptr_t)&__heap_base;
    begin = (begin + 15) & ~(uint64_t)15;
    uint64_t end = begin + size;
    uint64_t room = (uint64_t)__builtin_wasm_memory_size(0) << 16;
    if (end > UINT32_MAX) {
        return NULL;
    }
    if (end > room && __builtin_wasm_memory_grow(0, (size_t)((end - room + 0xFFFF) >> 16)) == SIZE_MAX) {
        return NULL;
    }
    persistency_heap_end = (uintptr_t)end;
    return (void *)(uintptr_t)begin;
}

#endif

/* `size` bytes for the plugin itself. Where there are none left the call ends here. */
static inline uint8_t *persistency_make(uint32_t size)
{
    uint8_t *made = (uint8_t *)persistency_alloc(size);
    if (!made) {
        __builtin_trap();
    }
    return made;
}

#ifndef PERSISTENCY_WITH_LIBC

/* clang may call these four for a loop or an assignment, even where there is no C library to have them. */
#define PERSISTENCY_PLAIN PERSISTENCY_SHARED __attribute__((no_builtin))

PERSISTENCY_PLAIN void *memcpy(void *to, const void *from, size_t size)
{
    for (size_t at = 0; at < size; at++) {
        ((uint8_t *)to)[at] = ((const uint8_t *)from)[at];
    }
    return to;
}

PERSISTENCY_PLAIN void *memset(void *to, int value, size_t size)
{
    for (size_t at = 0; at < size; at++) {
        ((uint8_t *)to)[at] = (uint8_t)value;
    }
    return to;
}

PERSISTENCY_PLAIN int memcmp(const void *one, const void *other, size_t size)
{
    for (size_t at = 0; at < size; at++) {
        int differ = ((const uint8_t *)one)[at] - ((const uint8_t *)other)[at];
        if (differ) {
            return differ;
        }
    }
    return 0;
}

PERSISTENCY_PLAIN size_t strlen(const char *text)
{
    size_t size = 0;
    while (text[size]) {
        size++;
    }
    return size;
}

#endif

/* -- bytes -------------------------------------------------------------------------------------------------------- */

/* Some bytes, or none at all: then `size` is PERSISTENCY_ABSENT. */
typedef struct {
    const uint8_t *data;
    uint32_t size;
} persistency_bytes;

static inline persistency_bytes persistency_bytes_of(const void *data, uint32_t size)
{
    persistency_bytes bytes;
    bytes.data = (const uint8_t *)data;
    bytes.size = size;
    return bytes;
}

static inline persistency_bytes persistency_none(void)
{
    return persistency_bytes_of(NULL, PERSISTENCY_ABSENT);
}

static inline int persistency_is_none(persistency_bytes bytes)
{
    return bytes.size == PERSISTENCY_ABSENT;
}

/* The bytes of a C string, without its zero. */
static inline persistency_bytes persistency_text(const char *text)
{
    uint32_t size = 0;
    while (text[size]) {
        size++;
    }
    return persistency_bytes_of(text, size);
}

/* Bytes that become more. They move when there is no more room where they are. */
typedef struct {
    uint8_t *data;
    uint32_t size;
    uint32_t room;
} persistency_buffer;

static inline persistency_buffer persistency_buffer_new(void)
{
    persistency_buffer buffer;
    buffer.data = NULL;
    buffer.size = 0;
    buffer.room = 0;
    return buffer;
}

/* Add bytes at the end. */
static inline void persistency_put(persistency_buffer *to, persistency_bytes bytes)
{
    uint64_t size = (uint64_t)to->size + bytes.size;
    if (size > to->room) {
        uint64_t room = 2 * size + 64;
        uint8_t *data = persistency_make(room > UINT32_MAX ? UINT32_MAX : (uint32_t)room);
        for (uint32_t at = 0; at < to->size; at++) {
            data[at] = to->data[at];
        }
        to->data = data;
        to->room = (uint32_t)room;
    }
    for (uint32_t at = 0; at < bytes.size; at++) {
        to->data[to->size + at] = bytes.data[at];
    }
    to->size = (uint32_t)size;
}

static inline persistency_bytes persistency_buffer_bytes(persistency_buffer buffer)
{
    return persistency_bytes_of(buffer.data, buffer.size);
}

/* One after the other, such as a prefix and a name. */
static inline persistency_bytes persistency_joined(persistency_bytes first, persistency_bytes second)
{
    persistency_buffer both = persistency_buffer_new();
    persistency_put(&both, first);
    persistency_put(&both, second);
    return persistency_buffer_bytes(both);
}

/* -- lists: for each entry its length (4 bytes, little-endian) and its bytes --------------------------------------- */

/* Add an entry at the end of a list. */
static inline void persistency_put_entry(persistency_buffer *list, persistency_bytes entry)
{
    uint8_t length[4];
    for (int at = 0; at < 4; at++) {
        length[at] = (uint8_t)(entry.size >> (8 * at));
    }
    persistency_put(list, persistency_bytes_of(length, 4));
    if (!persistency_is_none(entry)) {
        persistency_put(list, entry);
    }
}

/* Take the first entry off a list; 1 if there was one, 0 at the end. An entry may be none at all. */
static inline int persistency_next(persistency_bytes *list, persistency_bytes *entry)
{
    if (list->size < 4) {
        return 0;
    }
    const uint8_t *data = list->data;
    uint32_t size = data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24;
    uint32_t left = list->size - 4;
    if (size == PERSISTENCY_ABSENT) {
        *entry = persistency_none();
        size = 0;
    } else if (size > left) {
        return 0;
    } else {
        *entry = persistency_bytes_of(data + 4, size);
    }
    *list = persistency_bytes_of(data + 4 + size, left - size);
    return 1;
}

/* -- what a plugin's function returns ------------------------------------------------------------------------------ */

/* Return these bytes. They must stay where they are: not on the stack of the function that returns them. */
static inline int64_t persistency_answer(persistency_bytes bytes)
{
    return (int64_t)((uint64_t)(uintptr_t)bytes.data << 32 | bytes.size);
}

/* The text of the last error of this call, into a room of that many bytes: its length. It is written if it fits. */
static inline int64_t persistency_last_error(void *room, uint32_t room_len)
{
    return persistency_host_last_error(room, room_len);
}

/* `return persistency_fail("why");` in a function that the host has called. */
static inline int64_t persistency_fail(const char *text)
{
    persistency_bytes said = persistency_text(text);
    persistency_host_fail(said.data, said.size);
    return PERSISTENCY_FAILED;
}

/* `return persistency_fail_again();` passes on what the last function of the host that failed has said. */
static inline int64_t persistency_fail_again(void)
{
    uint8_t text[PERSISTENCY_TEXT_BYTES_MAX];
    int64_t size = persistency_host_last_error(text, sizeof text);
    if (size > 0 && size <= (int64_t)sizeof text) {
        persistency_host_fail(text, (uint32_t)size);
    }
    return PERSISTENCY_FAILED;
}

/* -- the store ---------------------------------------------------------------------------------------------------- */

/* 0. The value doesn't end. */
static inline int64_t persistency_kv_set(persistency_bytes key, persistency_bytes value)
{
    return persistency_host_kv_set(key.data, key.size, value.data, value.size);
}

/* 0. The value ends after so many milliseconds. */
static inline int64_t persistency_kv_set_with_ttl(persistency_bytes key, persistency_bytes value, int64_t ttl_ms)
{
    return persistency_host_kv_set_with_ttl(key.data, key.size, value.data, value.size, ttl_ms);
}

/* The value's length. It is written into the room if it fits: see `persistency_kv_read`, which makes room itself. */
static inline int64_t persistency_kv_get(persistency_bytes key, void *room, uint32_t room_len)
{
    return persistency_host_kv_get(key.data, key.size, room, room_len);
}

/* The length of the list of values for a list of keys. It is written if it fits: see `persistency_kv_read_many`. */
static inline int64_t persistency_kv_get_many(persistency_bytes keys, void *room, uint32_t room_len)
{
    return persistency_host_kv_get_many(keys.data, keys.size, room, room_len);
}

/* 1 or 0. */
static inline int64_t persistency_kv_has(persistency_bytes key)
{
    return persistency_host_kv_has(key.data, key.size);
}

/* The length of a list of keys that begin with the prefix, behind `after`, in order; 0 if there is none.

   `after` is the last key of the page before, or empty. See `persistency_kv_read_page`, which makes room itself. */
static inline int64_t persistency_kv_list(
    persistency_bytes prefix, persistency_bytes after, void *room, uint32_t room_len)
{
    return persistency_host_kv_list(prefix.data, prefix.size, after.data, after.size, room, room_len);
}

/* 1 if it was there, else 0. */
static inline int64_t persistency_kv_delete(persistency_bytes key)
{
    return persistency_host_kv_delete(key.data, key.size);
}

/* How many were there. */
static inline int64_t persistency_kv_delete_by_prefix(persistency_bytes prefix)
{
    return persistency_host_kv_delete_by_prefix(prefix.data, prefix.size);
}

/* How many bytes of its quota the plugin uses. */
static inline int64_t persistency_kv_storage_used(void)
{
    return persistency_host_kv_storage_used();
}

/* 1 if what was there was `expected`, and `desired` is there now; else 0, and nothing has changed.

   Each of the two may be none at all: create what isn't there, delete what is. */
static inline int64_t persistency_kv_compare_and_set(
    persistency_bytes key, persistency_bytes expected, persistency_bytes desired)
{
    return persistency_host_kv_compare_and_set(
        key.data, key.size, expected.data, expected.size, desired.data, desired.size);
}

/* -- reading into room of its own ------------------------------------------------------------------------------------

   Each makes room, asks, and asks again if it was too little. It returns an error, or the length of `*found`. */

static inline int64_t persistency_kv_read(persistency_bytes key, persistency_bytes *found)
{
    for (uint32_t room = 256;;) {
        uint8_t *data = persistency_make(room);
        int64_t size = persistency_kv_get(key, data, room);
        if (size <= (int64_t)room) {
            *found = size < 0 ? persistency_none() : persistency_bytes_of(data, (uint32_t)size);
            return size;
        }
        room = (uint32_t)size; /* enough, unless another call stores a longer one at this moment */
    }
}

static inline int64_t persistency_kv_read_many(persistency_bytes keys, persistency_bytes *found)
{
    for (uint32_t room = 4096;;) {
        uint8_t *data = persistency_make(room);
        int64_t size = persistency_kv_get_many(keys, data, room);
        if (size <= (int64_t)room) {
            *found = size < 0 ? persistency_none() : persistency_bytes_of(data, (uint32_t)size);
            return size;
        }
        room = size > (int64_t)UINT32_MAX ? UINT32_MAX : (uint32_t)size;
    }
}

/* A page of at least one key, as one is shorter than the room. */
static inline int64_t persistency_kv_read_page(
    persistency_bytes prefix, persistency_bytes after, persistency_bytes *found)
{
    uint32_t room = 4096;
    uint8_t *data = persistency_make(room);
    int64_t size = persistency_kv_list(prefix, after, data, room);
    *found = size < 0 ? persistency_none() : persistency_bytes_of(data, (uint32_t)size);
    return size;
}

#ifdef __cplusplus
}
#endif

#endif
