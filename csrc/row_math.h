// The mathematics of one row of logits, host and device: how partial sums combine and what the gradient is.
//
// A row holds z_v = x_v / temperature, v = 0..V-1, and one target column y. Kernels read the row in base 2,
// exp z_v = 2^(x_v * scale) with scale = log2(e) / temperature, and leave the target out of their sums. What they
// find for "the others" and the target logit combine here, in double, without a subtraction of near-equal numbers:
//
//     d   = logsumexp(others) - z_y           from the difference of two logits, so its size is no matter
//     l   = log p_y = -softplus(d)            never above 0, and exact however confident the row is
//     lse = logsumexp(all),  H = entropy of the row
//
// The gradient of any scalar L of (l, H, lse) with upstream (g_l, g_H, g_lse) is, for every loss,
//
//     dL/dz_v = g_l * 1{v = y} + p_v * (g_lse - g_l - g_H * (log p_v + H)),     dL/dx_v = dL/dz_v / temperature
//
// All of it is finite for finite logits, up to the largest. Stored as float, l is -inf where its number is too large.
//
// Capped logits: where the model computes c tanh(s x / c), the x_v above is tanh(tanh_scale * x) of the logit x, with
// tanh_scale = s / c, and the temperature is divided by c. The gradient by the logit has one more factor, the slope
// tanh_scale * (1 - tanh^2).
#pragma once

#include <cmath>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define GSPO_HD __host__ __device__
#else
#define GSPO_HD
#endif

// Functions are static: every instruction set compiles its own. Of one that the linker shares among them, an old
// processor could get the AVX-512 code.
namespace gspo {

constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2e = 1.44269504088896340736;

// Sums over every column but the target, relative to `base` (a logit): sum 2^t and sum t 2^t, t = (x - base) * scale.
struct Others {
  double base;
  double sum;
  double weighted;
};

struct RowStats {
  double logprob;
  double entropy;
  double lse;
  double p_target;  // exp(logprob)
  double p_others;  // 1 - p_target, to all its digits
};

// The others come to nothing (sum == 0) where V == 1 or all of them are -inf. A NaN or +inf logit gives NaN: it is the
// caller's bug and is not hidden. A row of -inf gives NaN, too, but for its lse, which is -inf: it may be a part of a
// row, and then has a share of 0.
GSPO_HD static inline RowStats combine(const Others& others, double target_logit, double scale) {
  const double target = target_logit == INFINITY ? NAN : target_logit;
  const bool alone = others.sum == 0.0;
  const double base = alone ? -INFINITY : others.base;
  const double log_sum = alone ? 0.0 : std::log2(others.sum);  // base 2
  const double d = ((base - target) * scale + log_sum) * kLn2;
  const double ratio = std::exp(d <= 0.0 ? d : -d);  // of the smaller share to the larger one
  const double near = std::log1p(ratio);  // softplus(-|d|)
  const double larger = 1.0 / (1.0 + ratio), smaller = ratio * larger;  // a division takes less time than exp(logprob)

  RowStats row;
  row.logprob = d <= 0.0 ? 0.0 - near : -(d + near);
  row.lse = alone && target == -INFINITY ? target : (d <= 0.0 ? target * scale : base * scale + log_sum) * kLn2 + near;

  // Entropy of {target, others}, plus the share of the others times their own: no term is negative.
  row.p_target = d <= 0.0 ? larger : smaller;
  row.p_others = d <= 0.0 ? smaller : larger;
  const double log_p_others = d <= 0.0 ? d - near : 0.0 - near;
  const double entropy_of_others = alone ? 0.0 : (log_sum - others.weighted / others.sum) * kLn2;
  row.entropy = d != d ? d : 0.0;
  if (row.p_target > 0.0) row.entropy -= row.p_target * row.logprob;
  if (row.p_others > 0.0) row.entropy += row.p_others * (entropy_of_others - log_p_others);
  return row;
}

// The same of a forward that is over, of which the caller kept three numbers.
GSPO_HD static inline RowStats saved_stats(double logprob, double entropy, double lse) {
  return {logprob, entropy, lse, std::exp(logprob), -std::expm1(logprob)};
}

// 1 - tanh(u)^2, to all its digits also where tanh is nearly 1.
GSPO_HD static inline double tanh_slope(double u) {
  const double e = std::exp(-2.0 * std::fabs(u));
  return 4.0 * e / ((1.0 + e) * (1.0 + e));
}

struct Upstream {  // dL/dlogprob, dL/dentropy, dL/dlse of one row
  double logprob;
  double entropy;
  double lse;
  GSPO_HD bool zero() const { return logprob == 0.0 && entropy == 0.0 && lse == 0.0; }
};

// What the exponents of a row's gradient are relative to: t = (x - value) * scale or, with a value that is scaled,
// t = x * scale - value.
struct Base {
  float value;
  float scale;
  double lost;  // how far the value is below lse, in nats
};

// Whether all columns but the largest have a probability of 0. Logits as large as that are at least 64 nats apart, as
// floats, and beside them lse has no digits for the sum, which is the number of ties: lse = max x / temperature + H.
GSPO_HD static inline bool only_ties(const RowStats& stats) { return std::fabs(stats.lse) >= 0x1p30; }

GSPO_HD static inline float logit_of_ties(const RowStats& stats, double temperature) {  // max x, to the bit
  return static_cast<float>((stats.lse - stats.entropy) * temperature);
}

// The base is the row's lse as a logit, rounded.
GSPO_HD static inline Base base_of(const RowStats& stats, double scale) {
  const double inverse_temperature = scale * kLn2;
  const float rounded_scale = static_cast<float>(scale);
  if (only_ties(stats)) return {logit_of_ties(stats, 1.0 / inverse_temperature), rounded_scale, stats.entropy};
  const double lse = stats.lse / inverse_temperature;
  const float value = static_cast<float>(lse);
  return {value, rounded_scale, (lse - value) * inverse_temperature};
}

// What a kernel needs to write a row's gradient. For every column but the target
//     dL/dx = 2^t * (constant + slope * t),   t as Base says
// What the rounding of the base lost is in the coefficients.
struct RowGradient {
  float base;
  float scale;
  float constant;
  float slope;
  float target;  // dL/dx of the target column
};

// `stats`: the forward's; from target and lse, logprob could only be computed by a subtraction. Where lse is -inf, the
// base and all that follows from it are NaN, for such a row has no gradient. `column_factor` and `target_factor`
// multiply the gradient of the target and of all other columns.
GSPO_HD static inline RowGradient gradient_of(const Upstream& g, const RowStats& stats, double scale, const Base& base,
                                       double column_factor = 1.0, double target_factor = 1.0) {
  const double logprob = stats.logprob, entropy = stats.entropy, inverse_temperature = scale * kLn2;
  RowGradient row;
  row.base = base.value;
  row.scale = base.scale;
  const float above = static_cast<float>(-base.lost);
  const double factor = std::exp(above) * (1.0 + (-base.lost - above)) * inverse_temperature * column_factor;
  row.constant = static_cast<float>(factor * (g.lse - g.logprob - g.entropy * (entropy - base.lost)));
  row.slope = static_cast<float>(-factor * g.entropy * kLn2);

  const double p = stats.p_target;
  const double through_p = p > 0.0 ? p * (g.lse - g.entropy * (logprob + entropy)) : 0.0;
  row.target = static_cast<float>((g.logprob * stats.p_others + through_p) * inverse_temperature * target_factor);
  return row;
}

}  // namespace gspo
