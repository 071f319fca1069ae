// The core of the affine form (see affine.py, reference.py) as one parallel region: each task is some query rows of one
// sample, whose maps of all heads never leave the core's cache. Compiled at first use by native.py; float32.
//
// Every array a task works on is padded with zeros to whole vectors: tokens to Np, head width to Dp.
// With C = softmax(scale q k^T) - 1/N and M = mix C, forward gives u = M v and sum M^2; backward recomputes both:
//   dM = du v^T + 2 dsumsq M,  dmix = sum dM C^T,  dA = mix^T dM,  dS = (C + 1/N) (dA - sum_j (C + 1/N) dA).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __AVX512F__
constexpr int W = 16;
extern "C" { const char* deepvit_instructions = "AVX512"; }
#else
constexpr int W = 8;
#ifdef __AVX2__
extern "C" { const char* deepvit_instructions = "AVX2"; }
#else
extern "C" { const char* deepvit_instructions = "DEFAULT"; }
#endif
#endif
typedef float Vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * W), aligned(4)));
constexpr int ROWS = 8;  // rows of a register block

static inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
static inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
static inline Vec all(float x) { return x - Vec{}; }  // a broadcast: the compiler may drop "- 0", but not "+ 0"
static inline long up(long n, long to) { return (n + to - 1) / to * to; }
static inline Ints lanes() { Ints i; for (int c = 0; c < W; c++) i[c] = c; return i; }
// Pairwise and in registers: log2(W) steps, each with the lanes a distance away; every lane holds the result
template <class Pair>
static inline Vec reduce(Vec x, Pair pair) {
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2) x = pair(x, __builtin_shuffle(x, lanes() ^ half));
    return x;
}
static inline Vec total(Vec x) { return reduce(x, [](Vec a, Vec b) { return a + b; }); }
static inline Vec largest(Vec x) { return reduce(x, [](Vec a, Vec b) { return a > b ? a : b; }); }

// exp for x <= 0 to about 1 ulp (Cephes' polynomial); below -87 as at -87
static inline Vec exponential(Vec x) {
    const Vec least = all(-87.0f), magic = all(12582912.0f);  // 1.5 2^23: adding it rounds to an integer
    x = x < least ? least : x;
    const Vec n = (x * 1.44269504088896341f + magic) - magic;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return y * (Vec)power;
}

// A left factor: element (i, k) at p[i * lead + k], or, transposed, at p[k * lead + i]
struct Rows {
    const float* p; long lead;
    float at(long i, long k) const { return p[i * lead + k]; }
    Rows below(long i) const { return {p + i * lead, lead}; }
};
struct Columns {
    const float* p; long lead;
    float at(long i, long k) const { return p[k * lead + i]; }
    Columns below(long i) const { return {p + i, lead}; }
};

template <int R, int V, bool ADD, class Left>
static inline void block(Left a, const float* b, long b_row, float* c, long c_row, long depth) {
    Vec sum[R][V];  // in registers, if every loop over it is unrolled
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 3
        for (int j = 0; j < V; j++) sum[i][j] = ADD ? load(c + i * c_row + j * W) : Vec{};
#pragma GCC unroll 1
    for (long k = 0; k < depth; k++, b += b_row) {
        Vec right[V];
#pragma GCC unroll 3
        for (int j = 0; j < V; j++) right[j] = load(b + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            const Vec left = all(a.at(i, k));
#pragma GCC unroll 3
            for (int j = 0; j < V; j++) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 3
        for (int j = 0; j < V; j++) store(c + i * c_row + j * W, sum[i][j]);
}

template <int R, bool ADD, class Left>
static void strip(Left a, const float* b, long b_row, float* c, long c_row, long cols, long depth) {
    constexpr int MOST = W == 16 ? 3 : 2;  // 24 of 32 registers, or 16 of 16: wider blocks would spill
    for (long left = cols / W; left > 0; b += W, c += W, left--) {
        if (MOST == 3 && left >= 3 && left != 4) {
            block<R, 3, ADD>(a, b, b_row, c, c_row, depth);
            b += 2 * W, c += 2 * W, left -= 2;
        } else if (left >= 2) {
            block<R, 2, ADD>(a, b, b_row, c, c_row, depth);
            b += W, c += W, left -= 1;
        } else {
            block<R, 1, ADD>(a, b, b_row, c, c_row, depth);
        }
    }
}

// c [rows, cols] (+)= a [rows, depth] b [depth, cols]; cols a multiple of W
template <bool ADD, class Left>
static void product(Left a, const float* b, long b_row, float* c, long c_row, long rows, long cols, long depth) {
    long i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        strip<ROWS, ADD>(a.below(i), b, b_row, c + i * c_row, c_row, cols, depth);
    for (; i + 6 <= rows; i += 6)
        strip<6, ADD>(a.below(i), b, b_row, c + i * c_row, c_row, cols, depth);
    for (; i + 4 <= rows; i += 4)
        strip<4, ADD>(a.below(i), b, b_row, c + i * c_row, c_row, cols, depth);
    for (; i + 2 <= rows; i += 2)
        strip<2, ADD>(a.below(i), b, b_row, c + i * c_row, c_row, cols, depth);
    for (; i < rows; i++)
        strip<1, ADD>(a.below(i), b, b_row, c + i * c_row, c_row, cols, depth);
}

// out [H, H] += a [H, length] b [H, length]^T, in T x T blocks
template <int T>
static void dots(const float* a, const float* b, long H, long length, float* out) {
    for (long i = 0; i < H; i += T)
        for (long j = 0; j < H; j += T) {
            Vec sum[T][T] = {};
#pragma GCC unroll 1
            for (long k = 0; k < length; k += W)
#pragma GCC unroll 4
                for (int r = 0; r < T; r++)
#pragma GCC unroll 4
                    for (int c = 0; c < T; c++)
                        sum[r][c] += load(a + (i + r) * length + k) * load(b + (j + c) * length + k);
            for (int r = 0; r < T; r++)
                for (int c = 0; c < T; c++) out[(i + r) * H + j + c] += total(sum[r][c])[0];
        }
}

static void outer(const float* a, const float* b, long H, long length, float* out) {
    (H % 4 == 0 ? dots<4> : H % 3 == 0 ? dots<3> : H % 2 == 0 ? dots<2> : dots<1>)(a, b, H, length, out);
}

struct Sizes {
    long B, H, N, D, sb, sh, sn;  // strides of q, k, v; width stride 1
    long rows, chunk;             // query rows of a tile; tiles of a task cover `chunk` rows
    float scale;
    long Np() const { return up(N, W); }
    long Dp() const { return up(D, W); }
    long chunks() const { return (N + chunk - 1) / chunk; }
};

// Working memory, which each thread keeps from call to call: fresh megabytes cost page faults
struct Scratch {
    float* next;
    explicit Scratch(long floats) {
        struct Kept { float* p = nullptr; long size = 0; ~Kept() { free(p); } };
        static thread_local Kept kept;
        if (kept.size < floats) {
            free(kept.p);
            kept.size = 0;
            kept.p = static_cast<float*>(aligned_alloc(64, up(4 * floats, 64)));
            if (!kept.p) throw std::bad_alloc();
            kept.size = floats;
        }
        next = kept.p;
    }
    float* take(long floats) { float* p = next; next += up(floats, 16); return p; }
};

// `[rows, Dp]` from `there` rows of stride `row`; zero beyond them and beyond D
static void pack(const float* from, long row, long there, long rows, long D, long Dp, float factor, float* to) {
    for (long i = 0; i < there; i++) {
        long c = 0;
        for (; c + W <= D; c += W) store(to + i * Dp + c, load(from + i * row + c) * factor);
        for (; c < Dp; c++) to[i * Dp + c] = c < D ? from[i * row + c] * factor : 0.0f;
    }
    memset(to + there * Dp, 0, 4 * (rows - there) * Dp);
}

// Rows of D and of stride `row` from `[rows, Dp]`
static void unpack(const float* from, float factor, long rows, long D, long Dp, long row, float* to) {
    for (long i = 0; i < rows; i++) {
        long c = 0;
        for (; c + W <= D; c += W) store(to + i * row + c, load(from + i * Dp + c) * factor);
        for (; c < D; c++) to[i * row + c] = from[i * Dp + c] * factor;
    }
}

// Rows of D and of stride `row`: a `[rows, depth]` times b `[depth, Dp]`, by way of `part` where W does not divide D
template <class Left>
static void product_to(Left a, const float* b, float* to, long row, long rows, long D, long Dp, long depth,
                       float* part) {
    const bool whole = D == Dp;
    product<false>(a, b, Dp, whole ? to : part, whole ? row : Dp, rows, Dp, depth);
    if (!whole) unpack(part, 1.0f, rows, D, Dp, row, to);
}

// `[Dp, Np]` from `[Np, Dp]`: squares of W vectors; their off-diagonal quarters are swapped, then those of each quarter
static void transpose(const float* from, long Np, long Dp, float* to) {
    for (long j = 0; j < Np; j += W)
        for (long c = 0; c < Dp; c += W) {
            Vec x[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) x[i] = load(from + (j + i) * Dp + c);
#pragma GCC unroll 4
            for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 16
                for (int i = 0; i < W; i++)
                    if (!(i & half)) {
                        const Ints low = (lanes() & half) ? lanes() - half + W : lanes(), high = low + half;
                        const Vec upper = x[i], lower = x[i + half];
                        x[i] = __builtin_shuffle(upper, lower, low);
                        x[i + half] = __builtin_shuffle(upper, lower, high);
                    }
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) store(to + (c + i) * Np + j, x[i]);
        }
}

// Logits of one row, in place, to softmax - 1/N; 0 beyond N
static void centred_softmax(float* x, long N, long Np) {
    const long last = Np - W;
    const Ints real = lanes() < static_cast<int>(N - last);  // in the last vector
    store(x + last, real ? load(x + last) : all(-INFINITY));
    Vec most = load(x);
    for (long j = W; j < Np; j += W) { const Vec y = load(x + j); most = y > most ? y : most; }
    most = largest(most);
    Vec sum = {};
    for (long j = 0; j < Np; j += W) {
        Vec e = exponential(load(x + j) - most);
        if (j == last) e = real ? e : Vec{};
        store(x + j, e);
        sum += e;
    }
    const Vec inverse = 1.0f / total(sum), centre = all(1.0f / N);
    for (long j = 0; j < Np; j += W) store(x + j, load(x + j) * inverse - centre);
    store(x + last, real ? load(x + last) : Vec{});
}

// Centred maps `[H, rows, Np]` from queries as they are given and scaled keys `[H, Dp, Np]`
static void fill_maps(const Sizes& s, const float* queries, const float* keys, long rows, float* maps) {
    const long Np = s.Np();
    for (long h = 0; h < s.H; h++) {
        float* map = maps + h * rows * Np;
        product<false>(Rows{queries + h * s.sh, s.sn}, keys + h * s.Dp() * Np, Np, map, Np, rows, Np, s.D);
        for (long i = 0; i < rows; i++) centred_softmax(map + i * Np, s.N, Np);
    }
}

static void forward_task(const Sizes& s, long b, long begin, const float* q, const float* k, const float* v,
                         const float* mix, float* u, double* sumsq, float* sums, Scratch scratch) {
    const long H = s.H, N = s.N, D = s.D, Np = s.Np(), Dp = s.Dp();
    float *keys = scratch.take(H * Dp * Np), *values = scratch.take(H * Np * Dp), *key_rows = scratch.take(Np * Dp);
    float *maps = scratch.take(H * s.rows * Np), *mixed = scratch.take(H * s.rows * Np);
    float* part = scratch.take(s.rows * Dp);
    for (long h = 0; h < H; h++) {
        pack(k + b * s.sb + h * s.sh, s.sn, N, Np, D, Dp, s.scale, key_rows);
        transpose(key_rows, Np, Dp, keys + h * Dp * Np);
        pack(v + b * s.sb + h * s.sh, s.sn, N, Np, D, Dp, 1.0f, values + h * Np * Dp);
        for (long c = 0; begin == 0 && c < Dp; c += W) {
            Vec sum = {};
            for (long j = 0; j < N; j++) sum += load(values + (h * Np + j) * Dp + c);
            for (long i = 0; i < W && c + i < D; i++) sums[(b * H + h) * D + c + i] = sum[i];
        }
    }
    const long end = std::min(begin + s.chunk, N);
    for (long i = begin; i < end; i += s.rows) {
        const long rows = std::min(end - i, s.rows), area = rows * Np;
        fill_maps(s, q + b * s.sb + i * s.sn, keys, rows, maps);
        product<false>(Rows{mix, H}, maps, area, mixed, area, H, area, H);
        for (long h = 0; h < H; h++) {
            const float* m = mixed + h * area;
            Vec squares = {};
            for (long j = 0; j < area; j += W) squares += load(m + j) * load(m + j);
            sumsq[h] += total(squares)[0];
            product_to(Rows{m, Np}, values + h * Np * Dp, u + ((b * N + i) * H + h) * D, H * D, rows, D, Dp, N, part);
        }
    }
}

// dmix `[H, H]` is added to; dk and dv are this task's `[N, H, D]`
static void backward_task(const Sizes& s, long b, long begin, const float* q, const float* k, const float* v,
                          const float* mix, const float* du, const float* dsumsq, const float* dtotal, float* dq,
                          float* dk, float* dv, float* dmix, Scratch scratch) {
    const long H = s.H, N = s.N, D = s.D, Np = s.Np(), Dp = s.Dp(), most = s.rows * Np;
    const long side = H * Np * Dp;
    float *keys = scratch.take(side), *key_rows = scratch.take(side), *columns = scratch.take(side);
    float *queries = scratch.take(H * s.rows * Dp), *grads = scratch.take(H * s.rows * Dp);
    float *maps = scratch.take(H * most), *mixed = scratch.take(H * most), *back = scratch.take(H * most);
    float *part = scratch.take(s.rows * Dp), *sum_k = scratch.take(side), *sum_v = scratch.take(side);
    memset(sum_k, 0, 4 * side);
    for (long h = 0; h < H; h++) {
        const long at = b * s.sb + h * s.sh;
        pack(k + at, s.sn, N, Np, D, Dp, s.scale, key_rows + h * Np * Dp);
        transpose(key_rows + h * Np * Dp, Np, Dp, keys + h * Dp * Np);
        pack(v + at, s.sn, N, Np, D, Dp, 1.0f, sum_v);  // the first place that is free
        transpose(sum_v, Np, Dp, columns + h * Dp * Np);
    }
    for (long h = 0; h < H; h++)
        pack(dtotal + (b * H + h) * D, 0, begin == 0 ? N : 0, Np, D, Dp, 1.0f, sum_v + h * Np * Dp);  // once a sample
    const float centre = 1.0f / N;
    const long end = std::min(begin + s.chunk, N);
    for (long i = begin; i < end; i += s.rows) {
        const long rows = std::min(end - i, s.rows), area = rows * Np;
        for (long h = 0; h < H; h++) {
            pack(q + b * s.sb + h * s.sh + i * s.sn, s.sn, rows, rows, D, Dp, 1.0f, queries + h * rows * Dp);
            pack(du + ((b * N + i) * H + h) * D, H * D, rows, rows, D, Dp, 1.0f, grads + h * rows * Dp);
        }
        fill_maps(s, q + b * s.sb + i * s.sn, keys, rows, maps);
        product<false>(Rows{mix, H}, maps, area, mixed, area, H, area, H);
        for (long h = 0; h < H; h++) {
            float *m = mixed + h * area, *g = grads + h * rows * Dp;
            product<true>(Columns{m, Np}, g, Dp, sum_v + h * Np * Dp, Dp, N, Dp, rows);
            for (long j = 0; j < area; j += W) store(m + j, load(m + j) * (2 * dsumsq[b * H + h]));
            product<true>(Rows{g, Dp}, columns + h * Dp * Np, Np, m, Np, rows, Np, D);  // mixed is now dM
        }
        outer(mixed, maps, H, area, dmix);
        product<false>(Columns{mix, H}, mixed, area, back, area, H, area, H);
        for (long h = 0; h < H; h++) {
            for (long r = 0; r < rows; r++) {
                float *da = back + h * area + r * Np, *c = maps + h * area + r * Np;
                Vec sum = {};
                for (long j = 0; j < Np; j += W) sum += (load(c + j) + centre) * load(da + j);
                const Vec delta = total(sum);
                for (long j = 0; j < Np; j += W) store(da + j, (load(c + j) + centre) * (load(da + j) - delta));
            }
            const float* ds = back + h * area;
            float* to = dq + ((b * N + i) * H + h) * D;
            product_to(Rows{ds, Np}, key_rows + h * Np * Dp, to, H * D, rows, D, Dp, N, part);
            product<true>(Columns{ds, Np}, queries + h * rows * Dp, Dp, sum_k + h * Np * Dp, Dp, N, Dp, rows);
        }
    }
    for (long h = 0; h < H; h++) {
        unpack(sum_k + h * Np * Dp, s.scale, N, D, Dp, H * D, dk + h * D);
        unpack(sum_v + h * Np * Dp, 1.0f, N, D, Dp, H * D, dv + h * D);
    }
}

extern "C" {

// u `[B, N, H, D]`; sumsq `[B chunks, H]`, a row per task, zero before; sums `[B, H, D]` of v over N
void deepvit_forward(const float* q, const float* k, const float* v, const float* mix, float* u, double* sumsq,
                     float* sums, const Sizes* sizes, int threads) {
    const Sizes s = *sizes;
    const long floats = (2 * s.H + 1) * s.Np() * s.Dp() + 2 * s.H * s.rows * s.Np() + s.rows * s.Dp() + 96;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < s.B * s.chunks(); task++)
        forward_task(s, task / s.chunks(), task % s.chunks() * s.chunk, q, k, v, mix, u, sumsq + task * s.H,
                     sums, Scratch(floats));
}

// du, dq `[B, N, H, D]`; dsumsq `[B, H]`; dk, dv `[B chunks, N, H, D]` and dmix `[B chunks, H, H]`, zero before, a part
// per task
void deepvit_backward(const float* q, const float* k, const float* v, const float* mix, const float* du,
                      const float* dsumsq, const float* dtotal, float* dq, float* dk, float* dv, float* dmix,
                      const Sizes* sizes, int threads) {
    const Sizes s = *sizes;
    const long side = s.N * s.H * s.D;
    const long floats = 5 * s.H * s.Np() * s.Dp() + s.H * s.rows * (2 * s.Dp() + 3 * s.Np()) + s.rows * s.Dp() + 192;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long task = 0; task < s.B * s.chunks(); task++)
        backward_task(s, task / s.chunks(), task % s.chunks() * s.chunk, q, k, v, mix, du, dsumsq, dtotal, dq,
                      dk + task * side, dv + task * side, dmix + task * s.H * s.H, Scratch(floats));
}
}
