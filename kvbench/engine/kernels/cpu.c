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

/* Attention of some queries to a sequence's entries and to its own token. The token comes last, which
 * removes what hidden entries have left in the sums. A learnt sink is an entry without a value. */
static inline __attribute__((always_inline)) void
finish(const int queries, const float *q, const float *keys, const float *values,
       const int32_t *positions, int64_t hidden, int64_t length, const float *key,
       const float *value, float scaling, float softcap, const float *sinks, float *out)
{
    float total[AT_ONCE] = {0}, most[AT_ONCE] = {LEAST, LEAST, LEAST, LEAST};
    memset(out, 0, queries * VALUE_SIZE * sizeof(float));
    if (sinks)
        for (int g = 0; g < queries; g++) {
            most[g] = sinks[g];
            total[g] = 1;
        }
    attend(queries, q, keys, values, positions, hidden, length, scaling, softcap, out, total, most);
    attend(queries, q, key, value, 0, 0, 1, scaling, softcap, out, total, most);
    for (int g = 0; g < queries; g++)
        for (int64_t d = 0; d < VALUE_SIZE; d++)
            out[g * VALUE_SIZE + d] /= total[g];
}

/* Each of `count` sequences has a token at position here[u]: q [count, group, SIZE], key [count,
 * SIZE] and value [count, VALUE_SIZE], all contiguous. It attends to itself and to the first
 * lengths[u] entries at the addresses keys[u] and values[u] (only the last `sliding` tokens if that
 * is not 0); then its entry is stored in slots[u]. sinks is [count, group] or 0, out is [count,
 * group, VALUE_SIZE]. */
void kvbench_token(const float *q, const float *key, const float *value, const int64_t *here,
                   const int64_t *keys, const int64_t *values, const int64_t *positions,
                   const int64_t *lengths, const int64_t *slots, const float *sinks, float *out,
                   int64_t count, int64_t group, int64_t sliding, float scaling, float softcap,
                   int threads)
{
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t u = 0; u < count; u++) {
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
        finish(n, qs, ks, vs, sliding ? places : 0, here[u] - sliding, lengths[u], own_key,        \
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
    }
}
