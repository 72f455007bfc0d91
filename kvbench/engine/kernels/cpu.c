/* Attention of single tokens: softmax(q K) V for each of many sequences of different lengths.
 *
 * A sequence is a KV head of a row. Its keys and values are read once, where they are stored, for
 * all query heads of its group. The threads are those of PyTorch, which has loaded the same OpenMP.
 *
 * It is compiled for one SIZE of keys and queries and one VALUE_SIZE of values, so that sums stay in
 * registers; this makes it up to twice as fast.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define AT_ONCE 4 /* queries that share a pass over the keys */
#define BLOCK 256 /* entries whose keys and values fit in the processor's cache */
#define LEAST -1e30f /* a logit that hides an entry; -ffast-math has no infinity */

/* Attends to `length` more entries; if `positions` are given, those up to `hidden` are left out; if
 * `softcap` is not 0, logits are capped by it.
 * out is the weighted sum so far, total the sum of the weights, most the largest logit. */
static inline __attribute__((always_inline)) void
attend(const int queries, const float *restrict q, const float *restrict keys,
       const float *restrict values, const int32_t *restrict positions, int64_t hidden,
       int64_t length, float scaling, float softcap, float *restrict out, float *restrict total,
       float *restrict most)
{
    float weights[AT_ONCE][BLOCK];
    for (int64_t start = 0; start < length; start += BLOCK) {
        const int64_t count = length - start < BLOCK ? length - start : BLOCK;
        const float *k = keys + start * SIZE, *v = values + start * VALUE_SIZE;
        for (int64_t s = 0; s < count; s++)
            for (int g = 0; g < queries; g++) {
                float sum = 0;
                for (int64_t d = 0; d < SIZE; d++)
                    sum += q[g * SIZE + d] * k[s * SIZE + d];
                weights[g][s] = sum * scaling;
            }
        for (int g = 0; g < queries; g++) {
            float *w = weights[g], high = most[g], sum = 0;
            if (softcap)
                for (int64_t s = 0; s < count; s++)
                    w[s] = softcap * tanhf(w[s] / softcap);
            if (positions)
                for (int64_t s = 0; s < count; s++)
                    w[s] = positions[start + s] <= hidden ? LEAST : w[s];
            for (int64_t s = 0; s < count; s++)
                high = w[s] > high ? w[s] : high;
            for (int64_t s = 0; s < count; s++) {
                w[s] = expf(w[s] - high);
                sum += w[s];
            }
            if (high > most[g]) {
                const float shrink = expf(most[g] - high);
                for (int64_t d = 0; d < VALUE_SIZE; d++)
                    out[g * VALUE_SIZE + d] *= shrink;
                total[g] *= shrink;
                most[g] = high;
            }
            total[g] += sum;
        }
        for (int64_t s = 0; s < count; s++)
            for (int g = 0; g < queries; g++)
                for (int64_t d = 0; d < VALUE_SIZE; d++)
                    out[g * VALUE_SIZE + d] += weights[g][s] * v[s * VALUE_SIZE + d];
    }
}

/* Consecutive entries. */
typedef struct {
    int64_t start, count;
} run;

/* The value of rank `rank` (from 0) of `count` values in descending order, which are reordered. */
static float ranked(float *values, int64_t count, int64_t rank)
{
    int64_t low = 0, high = count - 1;
    while (low < high) {
        const float pivot = values[(low + high) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (values[i] > pivot)
                i++;
            while (values[j] < pivot)
                j--;
            if (i <= j) {
                const float swap = values[i];
                values[i++] = values[j];
                values[j--] = swap;
            }
        }
        if (rank <= j)
            high = j;
        else if (rank >= i)
            low = i;
        else
            break;
    }
    return values[rank];
}

/* The runs of the `wanted` pages with the highest bounds, of the first `length` entries in pages of
 * `page`; a page's bound is the largest, over the queries, of what a key within its `mins` and
 * `maxs` can give. Returns their number; `bounds` and `order` have a float for each page. */
static int64_t best_pages(int64_t queries, const float *q, const float *mins, const float *maxs,
                          int64_t length, int64_t page, int64_t wanted, float *bounds, float *order,
                          run *runs)
{
    const int64_t pages = (length + page - 1) / page;
    for (int64_t p = 0; p < pages; p++) {
        float most = LEAST;
        for (int64_t g = 0; g < queries; g++) {
            float sum = 0;
            for (int64_t d = 0; d < SIZE; d++) {
                const float low = q[g * SIZE + d] * mins[p * SIZE + d];
                const float high = q[g * SIZE + d] * maxs[p * SIZE + d];
                sum += low > high ? low : high;
            }
            most = sum > most ? sum : most;
        }
        bounds[p] = order[p] = most;
    }
    const float least = ranked(order, pages, wanted - 1);
    int64_t ties = wanted, found = 0;
    for (int64_t p = 0; p < pages; p++)
        ties -= bounds[p] > least;
    for (int64_t p = 0; p < pages; p++) {
        if (bounds[p] < least || (bounds[p] == least && ties-- <= 0))
            continue;
        const int64_t start = p * page, left = length - start;
        const int64_t count = left < page ? left : page;
        if (found && runs[found - 1].start + runs[found - 1].count == start)
            runs[found - 1].count += count;
        else
            runs[found++] = (run){start, count};
    }
    return found;
}

/* Widens the bounds of the page of the entry `slot`, which holds `key` from now on. */
static void widen(float *mins, float *maxs, int64_t slot, int64_t page, const float *key)
{
    float *low = mins + slot / page * SIZE, *high = maxs + slot / page * SIZE;
    for (int64_t d = 0; d < SIZE; d++) {
        const int first = slot % page == 0;
        low[d] = first || key[d] < low[d] ? key[d] : low[d];
        high[d] = first || key[d] > high[d] ? key[d] : high[d];
    }
}

/* Attention of some queries to the entries of some runs and to their own token. The token comes
 * last, which removes what hidden entries have left in the sums. A learnt sink is an entry without a
 * value. */
static inline __attribute__((always_inline)) void
finish(const int queries, const float *q, const float *keys, const float *values,
       const int32_t *positions, int64_t hidden, const run *runs, int64_t count, const float *key,
       const float *value, float scaling, float softcap, const float *sinks, float *out)
{
    float total[AT_ONCE] = {0}, most[AT_ONCE] = {LEAST, LEAST, LEAST, LEAST};
    memset(out, 0, queries * VALUE_SIZE * sizeof(float));
    if (sinks)
        for (int g = 0; g < queries; g++) {
            most[g] = sinks[g];
            total[g] = 1;
        }
    for (int64_t r = 0; r < count; r++)
        attend(queries, q, keys + runs[r].start * SIZE, values + runs[r].start * VALUE_SIZE,
               positions ? positions + runs[r].start : 0, hidden, runs[r].count, scaling, softcap,
               out, total, most);
    attend(queries, q, key, value, 0, 0, 1, scaling, softcap, out, total, most);
    for (int g = 0; g < queries; g++)
        for (int64_t d = 0; d < VALUE_SIZE; d++)
            out[g * VALUE_SIZE + d] /= total[g];
}

/* Each of `count` sequences has a token at position here[u]: q [count, group, SIZE], key [count,
 * SIZE] and value [count, VALUE_SIZE], all contiguous. It attends to itself and to the first
 * lengths[u] entries at the addresses keys[u] and values[u] (only the last `sliding` tokens if that
 * is not 0); then its entry is stored in slots[u]. sinks is [count, group] or 0, out is [count,
 * group, VALUE_SIZE].
 *
 * If `pages` is given and pages[u] is not 0, a sequence reads its wanted[u] best pages of pages[u]
 * entries; mins[u] and maxs[u] are the addresses of the bounds of its pages, and the number of
 * resident entries that it reads is added to what is stored at reads[u]. */
void kvbench_token(const float *q, const float *key, const float *value, const int64_t *here,
                   const int64_t *keys, const int64_t *values, const int64_t *positions,
                   const int64_t *lengths, const int64_t *slots, const float *sinks,
                   const int64_t *mins, const int64_t *maxs, const int64_t *pages,
                   const int64_t *wanted, const int64_t *reads, float *out, int64_t count,
                   int64_t group, int64_t sliding, float scaling, float softcap, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t u = 0; u < count; u++) {
        const int64_t page = pages ? pages[u] : 0;
        run all = {0, lengths[u]}, *runs = &all;
        int64_t found = 1;
        float *bounds = 0;
        if (page && wanted[u] * page < lengths[u]) {
            const int64_t most = lengths[u] / page + 1;
            bounds = malloc(most * (2 * sizeof(float) + sizeof(run)));
            runs = (run *)(bounds + 2 * most);
            found = best_pages(group, q + u * group * SIZE, (float *)mins[u], (float *)maxs[u],
                               lengths[u], page, wanted[u], bounds, bounds + most, runs);
        }
        for (int64_t r = 0; page && r < found; r++)
            *(int64_t *)reads[u] += runs[r].count;
        float *ks = (float *)keys[u], *vs = (float *)values[u];
        int32_t *places = (int32_t *)positions[u];
        const float *own_key = key + u * SIZE, *own_value = value + u * VALUE_SIZE;
        for (int64_t g = 0; g < group; g += AT_ONCE) {
            const float *qs = q + (u * group + g) * SIZE;
            const float *sink = sinks ? sinks + u * group + g : 0;
            float *to = out + (u * group + g) * VALUE_SIZE;
            switch (group - g) {
#define CASE(label, n)                                                                             \
    label:                                                                                         \
        finish(n, qs, ks, vs, sliding ? places : 0, here[u] - sliding, runs, found, own_key,       \
               own_value, scaling, softcap, sink, to);                                             \
        break;
                CASE(case 1, 1)
                CASE(case 2, 2)
                CASE(case 3, 3)
                CASE(default, AT_ONCE)
            }
        }
        memcpy(ks + slots[u] * SIZE, own_key, SIZE * sizeof(float));
        memcpy(vs + slots[u] * VALUE_SIZE, own_value, VALUE_SIZE * sizeof(float));
        places[slots[u]] = here[u];
        if (page)
            widen((float *)mins[u], (float *)maxs[u], slots[u], page, own_key);
        free(bounds);
    }
}
