"""What every generated C++ source begins with: types, and functions that give torch's results. No header is included.

Everything here is free of branches, so that loops of it vectorise. bfloat16 and float16 numbers are held as their bits; the
generator converts them to float32 and back as torch does.
"""

PRELUDE = """
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef uint16_t bf16;
typedef uint16_t half;

#define INLINE static inline __attribute__((always_inline))
#define INF __builtin_inf()
#define NAN __builtin_nan("")

template <class To, class From> INLINE To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "bits are neither lost nor made up");
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}

INLINE float from_bf16(bf16 x) { return bits<float>(uint32_t(x) << 16); }

INLINE bf16 to_bf16(float x) {
    const uint32_t b = bits<uint32_t>(x);
    const uint32_t nearest = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return bf16(x != x ? 0x7fc0u : nearest);
}

INLINE float from_half(half x) {
    const uint32_t magnitude = x & 0x7fffu, sign = uint32_t(x & 0x8000u) << 16;
    const uint32_t scaled = bits<uint32_t>(bits<float>(magnitude << 13) * 0x1p112f);  // exact, subnormals too
    return bits<float>((magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : scaled) | sign);
}

INLINE half to_half(float x) {
    const uint32_t b = bits<uint32_t>(x), magnitude = b & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t tiny = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;  // 2^-24 is the last place of 0.5
    const uint32_t finite = magnitude < 0x38800000u ? tiny : normal < 0x7c00u ? normal : 0x7c00u;
    return half((magnitude > 0x7f800000u ? 0x7e00u : magnitude >= 0x47800000u ? 0x7c00u : finite) | (b >> 16 & 0x8000u));
}

// NaN if either is. The inner choice is one instruction, which gives y if either is NaN.
template <class T> INLINE T maximum(T x, T y) { const T z = x > y ? x : y; return x != x ? x : z; }
template <class T> INLINE T minimum(T x, T y) { const T z = x < y ? x : y; return x != x ? x : z; }
template <class T> INLINE T sign(T x) { return T((x > 0 ? T(1) : T(0)) - (x < 0 ? T(1) : T(0))); }
template <class T> INLINE T absolute(T x) { return T(x < 0 ? -x : x); }
INLINE float absolute(float x) { return __builtin_fabsf(x); }
INLINE double absolute(double x) { return __builtin_fabs(x); }

template <class T> INLINE T lerp(T x, T y, T w) { return absolute(w) < T(0.5) ? x + w * (y - x) : y - (y - x) * (T(1) - w); }

// atan2 in float32 by its odd Taylor polynomial of degree 19, after halving the angle: off by 2e-9, besides rounding. The C
// library's would keep its loop from vectorising.
INLINE float atan2(float y, float x) {
    const float ax = absolute(x), ay = absolute(y), big = ax > ay ? ax : ay, small = ax > ay ? ay : ax;
    const float ratio = small == float(INF) ? 1.0f : small / (big == 0.0f ? 1.0f : big);
    const float h = ratio / (1.0f + __builtin_sqrtf(1.0f + ratio * ratio)), z = h * h;
    float s = -1.0f / 19 * z + 1.0f / 17;
    s = s * z - 1.0f / 15;
    s = s * z + 1.0f / 13;
    s = s * z - 1.0f / 11;
    s = s * z + 1.0f / 9;
    s = s * z - 1.0f / 7;
    s = s * z + 1.0f / 5;
    s = s * z - 1.0f / 3;
    const float part = 2.0f * (h + h * z * s), steep = ay > ax ? 1.57079637f - part : part;
    const float angle = bits<int32_t>(x) < 0 ? 3.14159274f - steep : steep;
    const float turned = bits<int32_t>(y) < 0 ? -angle : angle;
    return (x != x) | (y != y) ? x + y : turned;
}
INLINE double atan2(double y, double x) { return __builtin_atan2(y, x); }

// exp, log, log1p and tanh in float32, by series in float64 that are off by less than 1e-9 of the result, besides rounding. The
// C library's would keep their loops from vectorising.

// For arguments between -700 and 700.
INLINE double exp_series(double x) {
    const double k = (x * 1.4426950408889634 + 0x1.8p52) - 0x1.8p52, r = x - k * 0.6931471805599453;  // k is whole
    double s = 1.0 / 39916800;
    s = s * r + 1.0 / 3628800;
    s = s * r + 1.0 / 362880;
    s = s * r + 1.0 / 40320;
    s = s * r + 1.0 / 5040;
    s = s * r + 1.0 / 720;
    s = s * r + 1.0 / 120;
    s = s * r + 1.0 / 24;
    s = s * r + 1.0 / 6;
    s = s * r + 0.5;
    s = s * r + 1.0;
    s = s * r + 1.0;
    return s * bits<double>(int64_t(int32_t(k) + 1023) << 52);
}

// For positive normal numbers, as a power of two times one near 1.
INLINE double log_series(double x) {
    const uint64_t b = bits<uint64_t>(x), root = 0x3fe6a09e667f3bcd;  // the square root of a half
    const uint64_t e = (b - root + (uint64_t(1023) << 52)) >> 52;
    const double m = bits<double>(b - (e << 52) + (uint64_t(1023) << 52)), z = (m - 1.0) / (m + 1.0), y = z * z;
    double s = 1.0 / 15;
    s = s * y + 1.0 / 13;
    s = s * y + 1.0 / 11;
    s = s * y + 1.0 / 9;
    s = s * y + 1.0 / 7;
    s = s * y + 1.0 / 5;
    s = s * y + 1.0 / 3;
    s = s * y + 1.0;
    return double(int32_t(e) - 1023) * 0.6931471805599453 + 2.0 * z * s;
}

INLINE float exp(float x) { return float(exp_series(x < -110.0f ? -110.0f : x > 100.0f ? 100.0f : x)); }
INLINE double exp(double x) { return __builtin_exp(x); }

INLINE float log(float x) {
    const float y = float(log_series(x > 0.0f ? x : 1.0f));
    return x > 0.0f ? (x < float(INF) ? y : x) : x == 0.0f ? -float(INF) : float(NAN);
}
INLINE double log(double x) { return __builtin_log(x); }

INLINE float log1p(float x) {
    const double w = x, small = w * (1.0 - w * (0.5 - w * (1.0 / 3 - w * 0.25)));
    const float y = float(absolute(x) < 1e-4f ? small : log_series(x > -1.0f ? 1.0 + w : 1.0));
    return x > -1.0f ? (x < float(INF) ? y : x) : x == -1.0f ? -float(INF) : float(NAN);
}
INLINE double log1p(double x) { return __builtin_log1p(x); }

INLINE float tanh(float x) {
    const double a = absolute(x), e = exp_series(a < 20.0 ? 2.0 * a : 40.0);
    const double small = a * (1.0 - a * a * (1.0 / 3 - a * a * (2.0 / 15)));
    const float y = __builtin_copysignf(float(a < 1e-3 ? small : (e - 1.0) / (e + 1.0)), x);
    return x != x ? x : y;
}
INLINE double tanh(double x) { return __builtin_tanh(x); }

// The largest of a block's 32 values; NaN if one of them is.
template <class T> INLINE T block_amax(const T* x) {
    T a[16];
    for (int j = 0; j < 16; ++j) a[j] = maximum(x[j], x[j + 16]);
    for (int j = 0; j < 8; ++j) a[j] = maximum(a[j], a[j + 8]);
    for (int j = 0; j < 4; ++j) a[j] = maximum(a[j], a[j + 4]);
    return maximum(maximum(a[0], a[2]), maximum(a[1], a[3]));
}

// A code, as in hbcore/state/blocks.py.
INLINE int32_t root_code(float x, float largest) {
    const float y = x <= largest * largest ? x : largest * largest;
    const float above = __builtin_rintf(__builtin_sqrtf(y) + 0x1.000002p-1f);
    return int32_t(above) - (y <= above * (above - 1.0f) ? 1 : 0);
}

// Philox-4x32-10, as in hbcore/rules/noise.py: four words of a key and a counter of four words.
INLINE void philox(uint64_t key, uint64_t index, uint32_t* w, uint32_t c2 = 0, uint32_t c3 = 0) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32), c0 = uint32_t(index), c1 = uint32_t(index >> 32);
    #pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0;
        c1 = uint32_t(b);
        c2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c3 = uint32_t(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    w[0] = c0;
    w[1] = c1;
    w[2] = c2;
    w[3] = c3;
}

// A word for each of n elements from first on; a call of Philox serves four of a tensor. The buffer has room for 8 more.
INLINE const uint32_t* element_words(uint64_t key, uint64_t first, int64_t n, uint32_t* buffer) {
    const int64_t ahead = int64_t(first % 4), calls = (ahead + n + 3) / 4;
    #pragma omp simd
    for (int64_t i = 0; i < calls; ++i) philox(key, first / 4 + i, buffer + 4 * i);
    return buffer + ahead;
}

INLINE int64_t drawn(uint64_t key, uint64_t index) {
    uint32_t w[4];
    philox(key, index, w);
    return int64_t(uint64_t(w[0]) << 32 | w[1]);
}
"""
