/* Attention of single tokens: softmax(q K) V for each of many sequences of different lengths.
 *
 * One sequence is a KV head of a row: its keys and values are read once, from memory to the end,
 * for all query heads of its group. The threads are PyTorch's own: it has loaded the same OpenMP.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>

#define AT_ONCE 4 /* queries that share a pass over the keys: their sums stay in registers */

static inline __attribute__((always_inline)) void
attend(const int queries, const float *restrict q, const float *restrict k,
       const float *restrict v, float *restrict out, float *restrict weights, int64_t length,
       int64_t size, int64_t value_size, float scaling)
{
    for (int64_t s = 0; s < length; s++)
        for (int g = 0; g < queries; g++) {
            float sum = 0;
            for (int64_t d = 0; d < size; d++)
                sum += q[g * size + d] * k[s * size + d];
            weights[g * length + s] = sum * scaling;
        }
    float total[AT_ONCE];
    for (int g = 0; g < queries; g++) {
        float *w = weights + g * length, most = w[0];
        for (int64_t s = 1; s < length; s++)
            most = w[s] > most ? w[s] : most;
        total[g] = 0;
        for (int64_t s = 0; s < length; s++) {
            w[s] = expf(w[s] - most);
            total[g] += w[s];
        }
        for (int64_t d = 0; d < value_size; d++)
            out[g * value_size + d] = 0;
    }
    for (int64_t s = 0; s < length; s++)
        for (int g = 0; g < queries; g++)
            for (int64_t d = 0; d < value_size; d++)
                out[g * value_size + d] += weights[g * length + s] * v[s * value_size + d];
    for (int g = 0; g < queries; g++)
        for (int64_t d = 0; d < value_size; d++)
            out[g * value_size + d] /= total[g];
}

/* q [count, group, size], k [count, room, size], v [count, room, value_size], all contiguous; of
 * sequence u the first lengths[u] entries count. out [count, group, value_size]; scratch has room
 * for 4 x the longest length for each thread. */
void kvbench_token(const float *q, const float *k, const float *v, const int64_t *lengths,
                   float *out, float *scratch, int64_t count, int64_t group, int64_t room,
                   int64_t size, int64_t value_size, int64_t longest, float scaling, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t u = 0; u < count; u++) {
        float *weights = scratch + omp_get_thread_num() * AT_ONCE * longest;
        for (int64_t g = 0; g < group; g += AT_ONCE) {
            const float *qs = q + (u * group + g) * size, *ks = k + u * room * size;
            const float *vs = v + u * room * value_size;
            float *to = out + (u * group + g) * value_size;
            switch (group - g) {
#define CASE(label, n)                                                                             \
    label:                                                                                         \
        attend(n, qs, ks, vs, to, weights, lengths[u], size, value_size, scaling);                 \
        break;
                CASE(case 1, 1)
                CASE(case 2, 2)
                CASE(case 3, 3)
                CASE(default, AT_ONCE)
            }
        }
    }
}
