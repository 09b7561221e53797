// The slope of a token's loss by its log-probability, from numbers of this token alone; host and device.
//
// With A the advantage, r = log pi - log pi_old the log-ratio (pi: the current policy) and w the weight,
//
//     dL/dlog pi = -w * A + penalty * r,     w = min(exp(min(r, max_log_ratio)), max_weight)
//
// (the penalty up to |r| = max_log_ratio, beyond which it is constant).
//
// A range bounds how far the policy has moved, by one of three measures; the bounds are inside. Outside, w is held at
// the nearer bound, or the first term is dropped. All is computed in double.
#pragma once

#include <cmath>

#include "row_math.h"

namespace gspo {

// How far the policy has moved; mu is the policy of the rollout.
enum class Measure {
  kRatio,  // exp(r) - 1
  kTv,     // pi - mu
  kKl,     // the KL divergence of two Bernoulli distributions (this token or another), with the sign of pi - mu
};

struct Range {
  double low, high;
};

struct TokenSlope {
  const float* old_logprobs;      // absent: on-policy, then none of this is used
  const float* advantages;
  const float* rollout_logprobs;  // absent: old_logprobs
  Range positive, negative;       // for an advantage above 0, and for all others
  bool hold;                      // outside of the range (measure kRatio alone); else drop
  Measure measure;
  double max_weight, penalty, max_log_ratio;
};

struct Token {
  double logprob, old_logprob, rollout_logprob, advantage;
};

// pi - mu, or KL(mu || pi) = mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)) with the sign of pi - mu, which is
// infinite for pi = 1, unless mu = 1. Probabilities near 0 and 1 keep their digits: with p the larger of the two, the
// last logarithm is log1p(|pi - mu| / (1 - p)) or its negative. The log-probabilities are finite; that of the rollout
// may have been rounded to more than 0.
GSPO_HD static inline double moved_by(Measure measure, double logprob, double rollout_logprob) {
  const double step = logprob - rollout_logprob, apart = std::fabs(step);
  const double larger = step > 0.0 ? logprob : rollout_logprob;
  const double p = std::exp(larger), difference = p * -std::expm1(-apart);
  if (measure == Measure::kTv) return step > 0.0 ? difference : -difference;
  const double rest = 0.0 - std::expm1(larger);  // 1 - p; 0.0, not -0.0, for p = 1
  const double mu = step > 0.0 ? p - difference : p, others = step > 0.0 ? rest + difference : rest;
  return (others > 0.0 ? others * std::log1p(difference / rest) : 0.0) - mu * apart;
}

// NaN if a number that it depends on is NaN.
GSPO_HD static inline double slope_of(const Token& token, const TokenSlope& loss) {
  const auto finite = [](double x) { return x > 1e30 ? 1e30 : x < -1e30 ? -1e30 : x; };  // no inf - inf
  const double log_ratio = finite(token.logprob) - finite(token.old_logprob);
  const bool saturated = log_ratio > loss.max_log_ratio;
  const double deviation = std::expm1(saturated ? loss.max_log_ratio : log_ratio);
  double moved = deviation;
  if (loss.measure != Measure::kRatio)
    moved = moved_by(loss.measure, finite(token.logprob), finite(token.rollout_logprob));
  if (moved != moved || token.advantage != token.advantage) return NAN;
  const Range& range = token.advantage > 0.0 ? loss.positive : loss.negative;
  const bool below = moved < range.low, above = moved > range.high;
  const bool held = loss.hold && (below || above);
  double weight = 1.0 + (held ? below ? range.low : range.high : deviation);
  if (weight > loss.max_weight) weight = loss.max_weight;
  const bool unbounded = saturated && loss.max_weight == INFINITY;
  const bool dropped = !loss.hold && (below || above || unbounded);
  const bool constant = std::fabs(log_ratio) > loss.max_log_ratio;  // the penalty; of a NaN it is NaN
  return (dropped ? 0.0 : -weight * token.advantage) + (constant ? 0.0 : loss.penalty * log_ratio);
}

}  // namespace gspo
