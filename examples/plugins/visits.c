/* A plugin that counts visits: one of a visitor counts once in half an hour.

   It is granted `kvstore`. A visitor's count is under "count/<name>", and "seen/<name>" is there for as long as further
   visits don't count.

   Built with `persistency.h` beside it; see README.md. */

#include "persistency.h"

#define SEEN_MS (30 * 60 * 1000)
#define DIGITS_MAX 20

static uint64_t number_of(persistency_bytes text)
{
    uint64_t number = 0;
    for (uint32_t at = 0; at < text.size; at++) {
        number = 10 * number + (text.data[at] - '0');
    }
    return number;
}

static persistency_bytes decimal(uint64_t number)
{
    uint8_t *end = persistency_make(DIGITS_MAX) + DIGITS_MAX, *at = end;
    do {
        *--at = (uint8_t)('0' + number % 10);
        number /= 10;
    } while (number);
    return persistency_bytes_of(at, (uint32_t)(end - at));
}

static persistency_bytes key(const char *prefix, persistency_bytes name)
{
    return persistency_joined(persistency_text(prefix), name);
}

/* Give what is under a key as a number, 0 if nothing is, and as it stands there; or an error. */
static int64_t counted(persistency_bytes at, persistency_bytes *stored)
{
    int64_t error = persistency_kv_read(at, stored);
    if (error == PERSISTENCY_NOT_FOUND) {
        return 0;
    }
    return error < 0 ? error : (int64_t)number_of(*stored);
}

/* visit(name): count a visit; answer how many there have been, in decimal digits. */
PERSISTENCY_EXPORT(visit) int64_t visit(const uint8_t *data, uint32_t size)
{
    persistency_bytes name = persistency_bytes_of(data, size), stored;
    if (size == 0) {
        return persistency_fail("a visitor has a name");
    }
    persistency_bytes seen = key("seen/", name), at = key("count/", name);
    int64_t is_seen = persistency_kv_has(seen), count = 0, done = is_seen;
    if (is_seen == 0) {
        done = persistency_kv_set_with_ttl(seen, persistency_text(""), SEEN_MS);
    }
    if (done < 0) {
        return persistency_fail_again();
    }
    do { /* again if another call has counted one meanwhile */
        count = counted(at, &stored);
        if (count < 0) {
            return persistency_fail_again();
        }
        if (is_seen) {
            break;
        }
        done = persistency_kv_compare_and_set(at, stored, decimal((uint64_t)++count));
    } while (done == 0);
    return done < 0 ? persistency_fail_again() : persistency_answer(decimal((uint64_t)count));
}

/* report(): answer a line for each visitor, in the order of their names: the count, a blank, the name. */
PERSISTENCY_EXPORT(report) int64_t report(const uint8_t *data, uint32_t size)
{
    persistency_bytes prefix = persistency_text("count/"), after = persistency_text(""), page, counts, name, count;
    persistency_buffer lines = persistency_buffer_new();
    (void)data;
    if (size) {
        return persistency_fail("report takes nothing");
    }
    for (;;) {
        int64_t found = persistency_kv_read_page(prefix, after, &page);
        if (found == 0) {
            return persistency_answer(persistency_buffer_bytes(lines));
        }
        if (found < 0 || persistency_kv_read_many(page, &counts) < 0) {
            return persistency_fail_again();
        }
        while (persistency_next(&page, &name) && persistency_next(&counts, &count)) {
            after = name;
            if (persistency_is_none(count)) {
                continue; /* forgotten since the page was read */
            }
            persistency_put(&lines, count);
            persistency_put(&lines, persistency_text(" "));
            persistency_put(&lines, persistency_bytes_of(name.data + prefix.size, name.size - prefix.size));
            persistency_put(&lines, persistency_text("\n"));
        }
    }
}

/* forget(name): answer "1" if there was such a visitor, else "0". */
PERSISTENCY_EXPORT(forget) int64_t forget(const uint8_t *data, uint32_t size)
{
    persistency_bytes name = persistency_bytes_of(data, size);
    int64_t was_there = persistency_kv_delete(key("count/", name));
    if (was_there < 0 || persistency_kv_delete(key("seen/", name)) < 0) {
        return persistency_fail_again();
    }
    return persistency_answer(decimal((uint64_t)was_there));
}
