// The guided step (reference.guided_step) for a CPU in two passes: what of it is exact arithmetic.
//
// Whole numbers, and sums and products of floating point rounded once each, in the order in which the definition writes them: so the
// results are those of the definition in torch, bit for bit, whatever compiler made this and however wide its vectors are.
// Compiled without contraction (no fused multiply-add) and without fast-math. Logarithm, root, cosine and sine, and the sums over
// a sample, whose last bits are a library's own, are left to torch between and after the passes (native.py).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int WIDE = 64;  // counters at a time, for the compiler to put into vectors: g++ 12 unrolls 16 into code four times slower
constexpr int COLUMNS = 11;
enum { SIGMA, ALPHA, A, B, C, D, E, P, Q, F, R };

// Philox4x32-10 of the counters (first + i, c1, c2, c3), i < WIDE (philox.py).
void philox(uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1, uint32_t words[4][WIDE]) {
    for (int i = 0; i < WIDE; ++i) {
        words[0][i] = first + i;
        words[1][i] = c1;
        words[2][i] = c2;
        words[3][i] = c3;
    }
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < WIDE; ++i) {
            // A product's halves by themselves: vectors of 32 bits are twice as many a register as those of 64.
            const uint32_t w0 = words[0][i], w2 = words[2][i];
            const uint32_t high0 = uint32_t((uint64_t(w0) * 0xD2511F53u) >> 32), low0 = w0 * 0xD2511F53u;
            const uint32_t high2 = uint32_t((uint64_t(w2) * 0xCD9E8D57u) >> 32), low2 = w2 * 0xCD9E8D57u;
            words[0][i] = high2 ^ words[1][i] ^ k0;
            words[1][i] = low2;
            words[2][i] = high0 ^ words[3][i] ^ k1;
            words[3][i] = low0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// u [batch, blocks, 2] = uniforms u0, u2 of every counter; angle [batch, blocks, 2] = 2 pi u1, 2 pi u3.
template <typename T>
void uniforms(int64_t batch, int64_t blocks, int64_t stream, const int64_t* key, const int64_t* index, const int64_t* row,
              const int64_t* particle, T* u, T* angle) {
    const T scale = T(1.0 / 4294967296.0), half = T(0.5), turn = T(6.283185307179586);
    uint32_t words[4][WIDE];
    for (int64_t slot = 0; slot < batch; ++slot) {
        for (int64_t start = 0; start < blocks; start += WIDE) {
            philox(uint32_t(start), uint32_t(row[slot]), uint32_t(stream | particle[slot] << 16), uint32_t(index[slot]),
                   uint32_t(key[2 * slot]), uint32_t(key[2 * slot + 1]), words);
            T even[2 * WIDE], odd[2 * WIDE];
            for (int i = 0; i < WIDE; ++i) {
                even[2 * i] = (T(words[0][i]) + half) * scale;
                even[2 * i + 1] = (T(words[2][i]) + half) * scale;
                odd[2 * i] = turn * ((T(words[1][i]) + half) * scale);
                odd[2 * i + 1] = turn * ((T(words[3][i]) + half) * scale);
            }
            const int64_t there = blocks - start < WIDE ? blocks - start : WIDE;
            std::memcpy(u + 2 * (slot * blocks + start), even, 2 * there * sizeof(T));
            std::memcpy(angle + 2 * (slot * blocks + start), odd, 2 * there * sizeof(T));
        }
    }
}

// One sample's elements -> whether all of them are finite. z comes in `z_delta`, which leaves as z * delta. Without GRADIENT
// neither grad_a is read nor what is summed written, and z is left as it is.
template <typename T, bool GUIDED, bool GRADIENT>
bool update(int64_t n, const T* __restrict x, const T* __restrict x0_hat, const T* __restrict grad_a,
            const T* __restrict history, const T* __restrict row, T strength, T* __restrict x_out,
            T* __restrict history_out, T* __restrict grad_sq, T* __restrict delta_sq, T* __restrict z_delta) {
    const T a = row[A], b = row[B], c = row[C], d = row[D], e = row[E], p = row[P], q = row[Q], f = row[F], r = row[R];
    const T largest = std::numeric_limits<T>::max();
    int broken = 0;
    for (int64_t i = 0; i < n; ++i) {
        const T z = z_delta[i], push = GUIDED ? strength * grad_a[i] : T(0);
        const T delta = e * push;
        const T moved = (((a * x[i] + b * x0_hat[i]) + delta) + c * z) + d * history[i];
        const T remembered = ((p * x[i] + q * x0_hat[i]) + f * push) + r * history[i];
        broken |= !(std::fabs(moved) <= largest);
        broken |= !(std::fabs(remembered) <= largest);
        x_out[i] = moved;
        history_out[i] = remembered;
        if (GRADIENT) {
            grad_sq[i] = grad_a[i] * grad_a[i];
            delta_sq[i] = delta * delta;
            z_delta[i] = z * delta;
        }
    }
    return !broken;
}

// Whether every slot's plan is one of the table's, and its row one of the plan's, or the one behind its last.
bool there(int64_t batch, int64_t num_plans, int64_t longest, const int64_t* num_rows, const int64_t* plan, const int64_t* row) {
    for (int64_t at = 0; at < num_plans; ++at) {
        if (num_rows[at] < 1 || num_rows[at] > longest) return false;
    }
    for (int64_t slot = 0; slot < batch; ++slot) {
        if (plan[slot] < 0 || plan[slot] >= num_plans || row[slot] < 0 || row[slot] > num_rows[plan[slot]]) return false;
    }
    return true;
}

// radius = sqrt(-2 log u); cosine, sine of angle: [batch, blocks, 2]. The rest as in reference.guided_step; pictures [batch, n] in
// C order, grad_a null where no slot is guided. False, and nothing is written, where a plan or a row is not `there`.
template <typename T>
bool step(int64_t batch, int64_t n, int64_t num_plans, int64_t longest, const T* radius, const T* cosine, const T* sine, const T* x,
          const T* x0_hat, const T* grad_a, const T* history, const T* table, const int64_t* num_rows, const int64_t* plan,
          const int64_t* row, const bool* ok, const T* drive, const T* strength, const bool* guided, T* x_out,
          T* history_out, int64_t* row_out, bool* ok_out, T* grad_sq, T* delta_sq, T* z_delta) {
    if (!there(batch, num_plans, longest, num_rows, plan, row)) return false;
    const int64_t blocks = (n + 3) / 4;
    for (int64_t slot = 0; slot < batch; ++slot) {
        const int64_t at = slot * n, draws = slot * blocks * 2, pairs = n / 2;
        T* z = z_delta + at;
        for (int64_t i = 0; i < pairs; ++i) {
            z[2 * i] = radius[draws + i] * cosine[draws + i];
            z[2 * i + 1] = radius[draws + i] * sine[draws + i];
        }
        if (n % 2) z[n - 1] = radius[draws + pairs] * cosine[draws + pairs];

        const bool active = row[slot] < num_rows[plan[slot]];
        const int64_t near = row[slot] < longest - 1 ? row[slot] : longest - 1;
        const T* here = table + (plan[slot] * longest + near) * COLUMNS;
        const bool pushed = grad_a && guided[slot] && active;
        const auto run = pushed ? update<T, true, true> : grad_a ? update<T, false, true> : update<T, false, false>;
        const bool finite = run(n, x + at, x0_hat + at, grad_a ? grad_a + at : nullptr, history + at, here, strength[slot],
                                x_out + at, history_out + at, grad_sq + at, delta_sq + at, z);
        const bool sound = finite && (std::fabs(drive[slot]) <= std::numeric_limits<T>::max() || !pushed);
        const bool moves = active && ok[slot] && sound;
        if (!moves) {
            std::memcpy(x_out + at, x + at, n * sizeof(T));
            std::memcpy(history_out + at, history + at, n * sizeof(T));
        }
        row_out[slot] = row[slot] + moves;
        ok_out[slot] = ok[slot] && (sound || !active);
    }
    return true;
}

}  // namespace

#define FOR_TYPE(T, suffix)                                                                                              \
    extern "C" void uniforms_##suffix(int64_t batch, int64_t blocks, int64_t stream, const int64_t* key,                  \
                                      const int64_t* index, const int64_t* row, const int64_t* particle, T* u, T* angle) { \
        uniforms<T>(batch, blocks, stream, key, index, row, particle, u, angle);                                         \
    }                                                                                                                    \
    extern "C" bool step_##suffix(                                                                                       \
        int64_t batch, int64_t n, int64_t num_plans, int64_t longest, const T* radius, const T* cosine, const T* sine,   \
        const T* x, const T* x0_hat, const T* grad_a, const T* history, const T* table, const int64_t* num_rows,         \
        const int64_t* plan, const int64_t* row, const bool* ok, const T* drive, const T* strength, const bool* guided,  \
        T* x_out, T* history_out, int64_t* row_out, bool* ok_out, T* grad_sq, T* delta_sq, T* z_delta) {                 \
        return step<T>(batch, n, num_plans, longest, radius, cosine, sine, x, x0_hat, grad_a, history, table, num_rows,  \
                       plan, row, ok, drive, strength, guided, x_out, history_out, row_out, ok_out, grad_sq, delta_sq,   \
                       z_delta);                                                                                         \
    }

FOR_TYPE(float, f32)
FOR_TYPE(double, f64)
