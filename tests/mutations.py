"""What the suite must notice: faults to put into bnext's sources, one at a time, and the tests that find them.

A block of the table is one: a name, and what is then wrong; the file, behind an "@" the instruction set that it needs,
if any, and its tests as test_file::test_function; the text that is there, exactly once, behind "- ", and what takes its
place behind "+ " (nothing: it goes).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A fault: new in place of old, in a file; of the tests, arguments of pytest, one must then fail."""

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    unit: str | None = None  # the instruction set without which nothing can notice

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def compares_units(self) -> bool:
        """Whether only the comparison of two instruction sets can notice."""
        return any("test_isa" in test for test in self.tests)


def parse(block: str) -> Mutation:
    head, where, *change = block.splitlines()
    name, what = head.split(": ", 1)
    place, *tests = where.split()
    file, _, unit = place.partition("@")
    old, new = ("\n".join(line[2:] for line in change if line[0] == sign) for sign in "-+")
    if not tests or not old or any(line[:2] not in ("- ", "+ ") for line in change):
        raise ValueError(f"cannot read the mutation {name}")
    paths = tuple(f"tests/{test.replace('::', '.py::')}" for test in tests)
    return Mutation(name, what, file, old, new, paths, unit or None)


_TABLE = """
running-var-biased: running_var takes the biased variance
csrc/math.h test_running_stats::test_unbiased_variance_of_two_values
- return m2 / (n - 1);
+ return m2 / n;

variance-unbiased: the unbiased variance normalises
csrc/math.h test_forward::test_affine
- inline A biased_var(A m2, A n) {
-   return m2 / n;
+ inline A biased_var(A m2, A n) {
+   return m2 / (n - 1);

eps-outside-root: eps is added to the standard deviation
csrc/math.h test_forward::test_eps
- return 1 / std::sqrt(var + eps);
+ return 1 / (std::sqrt(var) + eps);

folded-shift: x * scale + shift instead of (x - mean) * scale + bias
csrc/math.h test_forward::test_hard_numbers
- return multiply_add(x - mean, scale, bias);
+ return multiply_add(x, scale, bias - mean * scale);

momentum-inverted: momentum weighs the old statistics
csrc/math.h test_running_stats::test_momentum_over_steps
- return (1 - factor) * running + factor * batch;
+ return factor * running + (1 - factor) * batch;

momentum-ignored: momentum is always 0.1
csrc/math.h test_running_stats::test_momentum_over_steps
- num_batches_tracked) : momentum;
+ num_batches_tracked) : 0.1;

cumulative-off-by-one: momentum=None divides by one batch too many
csrc/math.h test_running_stats::test_momentum_over_steps
- 1 / static_cast<double>(num_batches_tracked)
+ 1 / static_cast<double>(num_batches_tracked + 1)

chan-without-delta: blocks are combined as if their means were equal
csrc/math.h test_forward::test_shapes
- a.m2 = a.m2 + b.m2 + delta * delta * (share * n_a);
+ a.m2 = a.m2 + b.m2;

chan-infinite-means: the difference of infinite means makes NaN of them
csrc/math.h test_forward::test_nonfinite_channel
- delta - delta == 0 ?
+ true ?

grad-weight-without-invstd: grad_weight is of the centred input, not the normalised one
csrc/math.h test_backward::test_affine
- return sum_dy_xmu * invstd;
+ return sum_dy_xmu;

grad-input-without-mean: grad_input lacks the term of the mean
csrc/math.h test_backward::test_affine
- return multiply_add(mean - x, projection, dy - grad_mean) * scale;
+ return multiply_add(mean - x, projection, dy) * scale;

grad-input-without-projection: grad_input lacks the term of the variance
csrc/math.h test_backward::test_affine
- return multiply_add(mean - x, projection, dy - grad_mean) * scale;
+ return (dy - grad_mean) * scale;

projection-one-invstd: the term of the variance has invstd once, not squared
csrc/math.h test_backward::test_affine
- return sum_dy_xmu / count * invstd * invstd;
+ return sum_dy_xmu / count * invstd;

bfloat16-truncated: bfloat16 is cut off instead of rounded
csrc/half.h test_forward::test_every_half_value
- (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16
+ bits >> 16

bfloat16-ties-up: bfloat16 rounds ties up instead of to even
csrc/half.h test_forward::test_every_half_value
- (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16
+ (bits + 0x8000u) >> 16

float16-ties-up: float16 rounds ties up instead of to even
csrc/half.h test_forward::test_every_half_value
- magnitude + 0xfffu + ((magnitude >> 13) & 1u)
+ magnitude + 0x1000u

float16-small-flushed: denormal float16 numbers are read as zero
csrc/half.h test_forward::test_every_half_value
- magnitude < 0x400u ? small : normal));
+ magnitude < 0x400u ? small & 0u : normal));

shift-zero-planar: one-pass variance without a shift, channels first
csrc/cpu/statistics.inl test_forward::test_hard_numbers
- const A shift = static_cast<A>(shift_of(of_head.total(0), of_head.total(1), static_cast<double>(head.count())));
+ const A shift = 0;

shift-zero-channels-last: one-pass variance without a shift, channels last
csrc/cpu/statistics.inl test_forward::test_hard_numbers
- in<A>(shift_of(get<V>(all.sums + c), squares, static_cast<double>(some)));
+ in<A>(V{});

shift-not-repeated: only the first of the rows taken together have their shift
csrc/cpu/statistics.inl test_forward::test_hard_numbers
- repeat(shift.get(), row);

overflow-not-noticed: sums in double that are not finite are taken for the statistics
csrc/cpu/statistics.inl test_forward::test_squares_beyond_double
- return finite;
+ return finite | (squares == squares) | (squares != squares);

float32-overflow-trusted: sums of squares beyond float32 are taken for the statistics
csrc/cpu/statistics.inl test_forward::test_hard_numbers
- return finite & ((squares >= kTiny * count) | (p.eps >= kTiny ? none : Lanes<V>{})) & (4 * m.m2 >= squares);
+ return ((squares >= kTiny * count) | (p.eps >= kTiny ? none : Lanes<V>{})) & (4 * m.m2 >= squares);

float32-underflow-trusted: sums of squares below float32 are taken for the statistics
csrc/cpu/statistics.inl test_backward::test_sizes
- return finite & ((squares >= kTiny * count) | (p.eps >= kTiny ? none : Lanes<V>{})) & (4 * m.m2 >= squares);
+ return finite & (4 * m.m2 >= squares);

float32-no-squares-trusted: that squares are all 0 in float32 is taken for a variance of 0 beside a tiny eps
csrc/cpu/statistics.inl test_backward::test_sizes
- | (p.eps >= kTiny ? none : Lanes<V>{})) & (4 * m.m2 >= squares)
+ | none) & (4 * m.m2 >= squares)

sums-of-others-dropped: rows of channels that are not to be trusted are summed again in vain
csrc/cpu/statistics.inl test_forward::test_hard_numbers
- if (trusted_ones == C)
+ if (trusted_ones <= C)

moments-of-another-channel: of few channels that are not to be trusted the first is summed again
csrc/cpu/statistics.inl test_forward::test_one_hard_channel_of_many
- : wide_moments<T>(p, block, c));
+ : wide_moments<T>(p, block, 0));

instructions-trusted: what bfloat16's instructions sum is always taken for the statistics
csrc/cpu/statistics.inl@avx512bf16 test_backward::test_sizes
- return (p.eps >= kTiny ? none : Lanes<V>{}) | (finite & (squares >= kTiny * count) & (0x1p20 * m.m2 >= squares));
+ return finite | (squares == squares) | (squares != squares);

instructions-trusted-to-cancel: the same where they cancel
csrc/cpu/statistics.inl@avx512bf16 test_forward::test_a_constant_has_no_variance
-  & (0x1p20 * m.m2 >= squares));
+ );

mean-rounded-to-half: the batch's mean is rounded to the input's dtype
csrc/cpu/forward.inl test_forward::test_hard_numbers_of_half_types
- mean = moments.mean();
+ mean = to_float(from_float<T>(moments.mean()));

forward-count-batch-only: the variance divides by N instead of N * S
csrc/cpu/forward.inl test_forward::test_affine
- math::biased_var(moments.m2, count);
+ math::biased_var(moments.m2, static_cast<double>(p.N));

running-count-batch-only: running_var divides by N - 1 instead of N * S - 1
csrc/cpu/forward.inl test_running_stats::test_momentum_over_steps
- math::unbiased_var(moments.m2, count)
+ math::unbiased_var(moments.m2, static_cast<double>(p.N))

guard-ignored: skip_nonfinite=True changes nothing
csrc/running.h test_guarded::test_a_poisoned_channel_is_left_alone_and_counted
- if (p.skipped_batches && !(
+ if (false && !(

guard-of-any-width: a variance that only the buffers' dtype cannot hold is not skipped
csrc/running.h test_guarded::test_a_poisoned_channel_is_left_alone_and_counted
- finite(p.param_dtype, unbiased_var)
+ finite(DType::float64, unbiased_var)

guard-without-a-count: what is skipped is not counted
csrc/running.h test_guarded::test_a_poisoned_channel_is_left_alone_and_counted
- ++p.skipped_batches[c];

guard-forgotten: torch's own batch norm trains a guarded layer
bnext/modules.py test_guarded::test_where_torchs_own_must_run_there_is_no_unguarded_training
- if module.skip_nonfinite and module.training and module.track_running_stats:
+ if False:

guard-lost-in-silence: what revert_batchnorm leaves without a guard is not named
bnext/convert.py test_guarded::test_reverting_says_what_is_lost_and_converting_brings_it_back
- if guarded:
+ if False:

running-var-kept: running_var is not updated
csrc/running.h test_running_stats::test_momentum_over_steps
- update(p.running_var, unbiased_var);

eval-moves-buffers: evaluation changes running_mean
csrc/cpu/forward.inl test_running_stats::test_eval_touches_nothing
-       mean = read<double>(p.running_mean, p.param_dtype, c);
+       mean = read<double>(p.running_mean, p.param_dtype, c);
+       write(p.running_mean, p.param_dtype, c, 0.9 * mean);

half-weight-ignored: weights of a half dtype count as 1
csrc/cpu/common.inl test_forward::test_affine
- return p.weight ?
+ return p.weight && itemsize(p.param_dtype) > 2 ?

grad-bias-zero: grad_bias is 0
csrc/cpu/backward.inl test_backward::test_affine
- write(p.grad_bias, p.param_dtype, c, sum_dz);
+ write(p.grad_bias, p.param_dtype, c, 0);

grad-bias-scaled: grad_bias is multiplied by weight
csrc/cpu/backward.inl test_backward::test_shapes
- write(p.grad_bias, p.param_dtype, c, sum_dz);
+ write(p.grad_bias, p.param_dtype, c, sum_dz * (p.weight ? read<double>(p.weight, p.param_dtype, c) : 1));

backward-count-batch-only: the backward divides by N instead of N * S
csrc/cpu/backward.inl test_backward::test_affine
- static_cast<double>(p.count());
+ static_cast<double>(p.N);

backward-sums-in-half: the sum of grad_output is rounded to its dtype
csrc/cpu/backward.inl test_grid::test_cells
- const double sum_dz = p.reduces() ? scratch.partials[c] : 0;
+ const double sum_dz = p.reduces() ? to_float(from_float<T>(scratch.partials[c])) : 0;

products-overflow-trusted: sums of products beyond float32 are taken for the gradients
csrc/cpu/backward.inl test_backward::test_sizes
- (size <= kMost) & ((size >= kTiny * count) | (size == 0)));
+ ((size >= kTiny * count) | (size == 0)));

products-underflow-trusted: sums of products below float32 are taken for the gradients
csrc/cpu/backward.inl test_backward::test_sizes
- (size <= kMost) & ((size >= kTiny * count) | (size == 0)));
+ (size <= kMost));

gradients-overflow-trusted: sums of gradients beyond float32 are taken for the gradient of the bias
csrc/cpu/backward.inl test_backward::test_gradients_that_overflow_before_they_cancel
- (std::abs(sum.dz) <= kMost) &
+ true &

sum-of-another-dropped: the sums of a plane that is not to be trusted are made again in vain
csrc/cpu/backward.inl test_backward::test_sizes
- return Sums<Others...>::planar(p, tiling, k, c);
+ (void)Sums<Others...>::planar(p, tiling, k, c);

products-cancelling-trusted: sum(dy * x) - mean * sum(dy) is taken for the gradient wherever the mean lies
csrc/cpu/backward.inl@avx512bf16 test_backward::test_means_of_many_deviations
- (std::abs(normalized) <= 8) &
+ (std::abs(normalized) >= 0) &

products-not-centred: of bfloat16, sum(dy * x) is taken for sum(dy * (x - mean)), channels first
csrc/cpu/backward.inl@avx512bf16 test_backward::test_affine
- all.ab - static_cast<const float*>(p.mean)[c] * all.a
+ all.ab

products-not-centred-channels-last: the same, channels last
csrc/cpu/backward.inl@avx512bf16 test_backward::test_affine
- sums[row.width() + c] -= static_cast<const float*>(p.mean)[c] * sums[c];
+ continue;

eval-backward-as-training: the backward of evaluation goes through the statistics
csrc/cpu/backward.inl test_backward::test_affine
- if (p.training) {
+ if (p.training || p.reduces()) {

tail-elements-dropped: elements past the last whole vector of a plane are not summed
csrc/cpu/reduce.inl test_forward::test_affine
- const int64_t last = size % kSlots;
+ const int64_t last = 0;

tail-vectors-dropped: whole vectors past the last four of a plane are not summed
csrc/cpu/reduce.inl test_forward::test_affine
- switch ((size - i) / kSlots) {
+ switch (0) {

last-lanes-off-by-one: the last elements of a plane are one too few
csrc/cpu/reduce.inl test_forward::test_affine
- kTable + count + first
+ kTable + count - 1 + first

small-planes-dropped: planes smaller than a vector lack their last element
csrc/cpu/reduce.inl test_backward::test_tails_of_planes
- for (int64_t i = 0; i < size; ++i) {
+ for (int64_t i = 0; i < size - 1; ++i) {

tail-channels-dropped: channels past the last whole vector of a row are not summed
csrc/cpu/reduce.inl test_forward::test_affine
- for (; c < size; ++c) {
+ for (; c < 0; ++c) {

single-vectors-dropped: vectors of channels past the last few side by side are not summed
csrc/cpu/reduce.inl test_forward::test_affine
- for (; c + kLanes <= size; c += kLanes) vector(c);
+ for (; c + kLanes <= size; c += kLanes) {}

tail-rows-dropped: rows past the last that are summed together are not summed
csrc/cpu/reduce.inl test_forward::test_affine
- for (; row < rows; ++row) f(kAlone
+ for (; row < 0; ++row) f(kAlone

short-row-dropped: the last row, if it is short, is not summed
csrc/cpu/reduce.inl test_forward::test_affine
- elements - rows * width);
+ 0);

stretches-overlap: a stretch of rows begins with the last one of the stretch before
csrc/cpu/reduce.inl test_forward::test_shapes
- > 0; row += most * apart)
+ > 0; row += most * apart - (rows - row > most * apart + most))

pairs-tail-masked: of the last elements of a plane or row, the last is not summed
csrc/cpu/pairs.inl@avx512bf16 test_forward::test_affine
- kAll : (__mmask32(1) << count) - 1
+ kAll : (__mmask32(1) << (count - 1)) - 1

pairs-end-kept: the last short sums never come to the total
csrc/cpu/pairs.inl@avx512bf16 test_backward::test_tails_of_planes
-     flush();
-     return wide_;
+     return wide_;

pairs-end-forgotten: short sums are dropped when there are as many as are held
csrc/cpu/pairs.inl@avx512bf16 test_backward::test_tails_of_planes
- if (++count_ == kMost) flush();
+ if (++count_ == kMost) held_ = {}, count_ = 0;

pairs-odd-plane-dropped: a last plane without another is not summed
csrc/cpu/pairs.inl@avx512bf16 test_backward::test_tails_of_planes
- if (runs.count % 2) {
+ if (runs.count < 0) {

pairs-second-plane-as-first: of two planes the first one's end is summed twice
csrc/cpu/pairs.inl@avx512bf16 test_backward::test_tails_of_planes
- take_end(some[1], begin + runs.stride + many);
+ take_end(some[1], begin + many);

pairs-beginnings-dropped: of planes of many registers the beginnings are not summed
csrc/cpu/pairs.inl@avx512bf16 test_backward::test_tails_of_planes
- for (int64_t i = begin; i < begin + many; i += kMany) {
+ for (int64_t i = begin; i < begin; i += kMany) {

pairs-second-row-as-first: of two rows the first is summed twice
csrc/cpu/pair_rows.inl@avx512bf16 test_backward::test_tails_of_rows
- (2 * pair + r) * apart + c;
+ 2 * pair * apart + c;

pairs-held-dropped: the last short sums are not added
csrc/cpu/pair_rows.inl@avx512bf16 test_backward::test_tails_of_rows
- apart * width_, size);
-     });
-     flush();
+ apart * width_, size);
+     });

pairs-held-kept: short sums are added again
csrc/cpu/pair_rows.inl@avx512bf16 test_backward::test_tails_of_rows
- held_[i] = {};
+ if (i > 0) held_[i] = {};

pairs-lost-for-found: sums of denormals are taken for those of zeros
csrc/cpu/pair_rows.inl@avx512bf16 test_forward::test_denormals_are_not_lost_in_sums
- seen.add<same>(same ? b : gate(
+ if (c < 0) seen.add<same>(same ? b : gate(

pairs-columns-mixed: the sums of some channels are written as those of others
csrc/cpu/pair_rows.inl@avx512bf16 test_forward::test_affine
- quad % 2 ? columns.upper : columns.lower
+ quad / 4 ? columns.upper : columns.lower

planes-after-the-first-dropped: of several planes in a block only the first is summed
csrc/cpu/reduce.inl test_forward::test_affine
- for (int64_t n = 0; n < runs.count; ++n)
-       add_run(
+ for (int64_t n = 0; n < 1; ++n)
+       add_run(

rest-dropped: of float32 only the leading bits are summed
csrc/cpu/reduce.inl test_backward::test_affine
- rest = cpu::BNEXT_ISA::add(rest, subtract(first, part));
+ (void)rest;

rest-alone: the rest is not added to the sum of leading bits
csrc/cpu/reduce.inl test_backward::test_affine
- for (int piece = 0; kSplit && piece < kPieces; ++piece) add_in_double(
+ for (int piece = 0; kSplit && piece < 0; ++piece) add_in_double(

order-of-the-unit: the order of sums depends on the instruction set
csrc/cpu/reduce.inl test_isa::test_every_unit_gives_the_same_bits
- ? 8 : 4;
+ ? 8 : BNEXT_VECTOR_BYTES / 8;

tail-channels-unwritten: channels past the last whole vector of a row are not written
csrc/cpu/map.inl test_forward::test_affine
- for (int64_t c = whole; c < width; ++c) {
+ for (int64_t c = whole; c < 0; ++c) {

fold-dropped: of rows taken together only the first of each are summed
csrc/cpu/common.inl test_forward::test_affine
- for (int64_t r = 1; r < row.repeats; ++r)
+ for (int64_t r = 1; r < 1; ++r)

factors-not-repeated: of rows taken together only the first of each have the channels' factors
csrc/cpu/common.inl test_forward::test_affine
- for (int64_t i = c; i < row.width(); i += row.C)
+ for (int64_t i = c; i < row.C; i += row.C)

rows-past-four-unwritten: rows past the last four side by side are not written
csrc/cpu/map.inl test_forward::test_affine
- for (int64_t size; (size = std::min(width, end - i)) > 0; i += size)
+ for (int64_t size; (size = std::min(width, end - i)) > 0 && size < width; i += size)

short-row-unwritten: the last row, if it is short, is not written
csrc/cpu/map.inl test_forward::test_affine
- for (int64_t size; (size = std::min(width, end - i)) > 0; i += size)
+ for (int64_t size; (size = std::min(width, end - i)) == width; i += size)

stretches-unwritten: the second stretch of rows is not written
csrc/cpu/map.inl test_forward::test_shapes
- each(stretches, [&](int64_t n) { write(
+ each(stretches, [&](int64_t n) { if (n != 1) write(

end-of-piece-unwritten: elements past the last whole vector of a plane's first or last line are not written
csrc/cpu/map.inl test_backward::test_tails_of_planes
- write(size - kLanes);

small-planes-unwritten: of planes smaller than a vector only the first is written
csrc/cpu/map.inl test_backward::test_tails_of_planes
- if (size < kCount) return piecewise(0, runs * size);
+ if (size < kCount) return piecewise(0, size);

heads-unwritten: what lies before the first whole line is not written
csrc/cpu/map.inl test_backward::test_tails_of_planes
- piecewise(0, head);

tails-unwritten: what lies behind the last whole line is not written
csrc/cpu/map.inl test_backward::test_tails_of_planes
- piecewise(done, runs * size);

factors-of-the-plane-before: a vector with the end of a plane and the beginning of the next has the first one's factors
csrc/cpu/map.inl test_backward::test_tails_of_planes
- mixed(count, factor, next)
+ mixed(count, factor, factor)

down-as-up: downwards, a vector with the end of a plane and the beginning of the next is split as upwards
csrc/cpu/map.inl test_addresses::test_no_bit_depends_on_where_tensors_lie
- down ? kCount - left : left
+ left

down-factors-of-the-plane-behind: downwards, such a vector has the second plane's factors alone
csrc/cpu/map.inl test_addresses::test_no_bit_depends_on_where_tensors_lie
- mixed(count, next, factor)
+ mixed(count, factor, factor)

down-rows-unwritten: downwards, the first columns of a row are not written
csrc/cpu/map.inl test_addresses::test_no_bit_depends_on_where_tensors_lie
- for (int64_t i = 0; i < whole; i += kCount) {
+ for (int64_t i = 0; i < whole - down * kCount; i += kCount) {

odd-elements-as-even: where a plane ends, elements at odd places are taken for those before them
csrc/cpu/map.inl@avx512bf16 test_backward::test_tails_of_planes
- kParts - 1 - v) / kParts
+ kParts - 1) / kParts

denormals-flushed: bfloat16's instructions write denormals, which they take for zeros
csrc/cpu/vec.h@avx512bf16 test_forward::test_every_half_value
- if (__builtin_expect(_mm512_fpclass_ps_mask(v[0], kDenormal) | _mm512_fpclass_ps_mask(v[1], kDenormal), 0))
+ if (__builtin_expect(_mm512_fpclass_ps_mask(v[0], kDenormal) & 0, 0))

normal-forward-too-soon: bfloat16's instructions are trusted with results near a mean however small the weight
csrc/cpu/map.inl@avx512bf16 test_forward::test_results_that_are_denormals
- std::abs(mean * scale) >= 0x1p-70f
+ std::abs(mean * scale) >= 0

normal-bias-too-soon: bfloat16's instructions are trusted with any bias
csrc/cpu/map.inl@avx512bf16 test_forward::test_results_that_are_denormals
- std::abs(bias) >= 0x1p-95f
+ std::abs(bias) >= 0

normal-backward-too-soon: bfloat16's instructions are trusted with any gradients
csrc/cpu/map.inl@avx512bf16 test_backward::test_gradients_that_are_denormals
- return std::abs(mean * projection * scale) >= 0x1p-70f && std::abs(grad_mean * scale) >= 0x1p-95f;
+ return std::abs(mean * projection * scale) >= 0;

normal-for-another: one channel without denormals answers for all of them
csrc/cpu/map.inl@avx512bf16 test_forward::test_denormals_beside_another_channel
- std::all_of(
+ std::any_of(

denormals-flushed-at-even-places: denormals are looked for at odd places alone
csrc/cpu/vec.h@avx512bf16 test_forward::test_a_denormal_among_others
- _mm512_fpclass_ps_mask(v[0], kDenormal) | _mm512_fpclass_ps_mask(v[1], kDenormal)
+ _mm512_fpclass_ps_mask(v[1], kDenormal)

denormals-flushed-at-odd-places: denormals are looked for at even places alone
csrc/cpu/vec.h@avx512bf16 test_forward::test_a_denormal_among_others
- _mm512_fpclass_ps_mask(v[0], kDenormal) | _mm512_fpclass_ps_mask(v[1], kDenormal)
+ _mm512_fpclass_ps_mask(v[0], kDenormal)

planes-cut-short: a last block of a plane that is not whole is left out
csrc/cpu/tiling.cpp test_backward::test_shapes
- blocks_per_plane = (plane + block_size - 1) / block_size;
+ blocks_per_plane = plane / block_size;

chunks-by-threads: a tensor is cut into as many chunks as there are threads
csrc/cpu/dispatch.cpp test_threads::test_same_bits
- const Tiling tiling(p);
+ Tiling tiling(p);
+ tiling.chunks = std::min<int64_t>(tiling.blocks, at::get_num_threads());

pieces-cut-short: of planes cut into pieces the remainder is not written
csrc/cpu/dispatch.cpp test_threads::test_same_bits
- plane + p.S * (i + 1) / pieces}
+ plane + p.S / pieces * (i + 1)}

counter-kept: num_batches_tracked is not moved
csrc/cpu/ops.cpp test_running_stats::test_momentum_over_steps
- ++*p.num_batches_tracked;

counter-moved-twice: num_batches_tracked counts each batch twice
csrc/cpu/ops.cpp test_running_stats::test_momentum_over_steps
- ++*p.num_batches_tracked;
+ *p.num_batches_tracked += 2;

output-contiguous: the output is contiguous whatever the input is
csrc/host.h test_forward::test_affine
- const at::MemoryFormat format = output_format(input);
+ const at::MemoryFormat format = at::MemoryFormat::Contiguous;

counter-version: nobody is told that num_batches_tracked was written
csrc/host.h test_running_stats::test_version_counters_move_as_torchs_do
- counter->unsafeGetTensorImpl()->bump_version();

strided-buffers-kept: buffers that are not contiguous are not updated
csrc/host.h test_running_stats::test_buffers_that_are_strided_views
- running_var_.write_back(running_var);

mask-ignored: grad_bias is computed where output_mask leaves it out
csrc/host.h test_ops::test_opcheck_backward
- if (output_mask[2]) grad_bias
+ grad_bias

written-before-checked: running_var moves before a check refuses the batch
csrc/host.h test_errors::test_a_refused_batch_is_counted
-   check::train(input, weight, bias, running_mean, running_var, num_batches_tracked, eps, skipped_batches);
-   return first_three(
+   if (has(running_var)) running_var->mul_(0.9);
+   check::train(input, weight, bias, running_mean, running_var, num_batches_tracked, eps, skipped_batches);
+   return first_three(

check-of-sizes: the size of running_mean is not checked
csrc/checks.h test_errors::test_refused
- channels("running_mean", running_mean, x, dtype);

check-of-one-value: one value per channel is taken for a batch
csrc/checks.h test_errors::test_refused
- TORCH_CHECK_VALUE(count != 1,
+ TORCH_CHECK_VALUE(count != -1,

saved-in-secret: what was saved for the backward can be changed unnoticed
csrc/autograd.cpp test_autograd::test_what_was_saved_may_not_change
- ctx->save_for_backward({input, weight.value_or(Tensor()), mean, invstd});
+ ctx->save_for_backward({input.data(), weight ? weight->data() : Tensor(), mean, invstd});

saved-in-secret-by-python: the same where Python calls the ops
bnext/function.py test_routes::test_what_was_saved_may_not_change
- ctx.save_for_backward(input, weight, mean, invstd)
+ ctx.save_for_backward(input.data, None if weight is None else weight.data, mean, invstd)

mask-of-all: every gradient is computed, wanted or not
csrc/autograd.cpp test_backward::test_requires_grad
- saved[3], training, mask);
+ saved[3], training, {true, true, true});

mask-of-all-by-python: the same where Python calls the ops
bnext/double_backward.py test_routes::test_same_bits
- mean, invstd, training, wanted[:3])
+ mean, invstd, training, (True, True, True))

edges-counted-wrong: what autograd asks for is looked up as if every argument were given
csrc/autograd.cpp test_routes::test_same_bits
- given && ctx->needs_input_grad(edge++)
+ given && ctx->needs_input_grad(i)

first-derivative-only: the gradients themselves are not differentiated
csrc/autograd.cpp test_autograd::test_second_derivative_is_torchs
- if (at::GradMode::is_enabled() ||
+ if (

tangents-lost: a tangent that comes to the backward does not leave it
csrc/autograd.cpp test_autograd::test_tangent_that_comes_through_the_gradient
-  || t->_fw_grad(0).defined()

unseen-by-modes: a mode that takes calls from Python sees none
bnext/function.py test_routes::test_a_mode_sees_the_op
- or has_torch_function_variadic(*tensors)

double-backward-of-constants: the double backward takes the statistics for constants
bnext/double_backward.py test_autograd::test_second_derivative_is_torchs
-     if training:
-         mean, _, invstd
+     if False:
+         mean, _, invstd

double-backward-without-weight: the double backward takes the weight for 1
bnext/double_backward.py test_autograd::test_second_derivative_is_torchs
- reference.backward(dz, x, w, mean,
+ reference.backward(dz, x, None, mean,

double-backward-counts-twice: a grad_output made of the input is differentiated a second time
bnext/double_backward.py test_autograd::test_upstream_that_depends_on_the_input
- t if t is None else t.view_as(t) for t in
+ t for t in

grad-bias-shape: the gradient of a bias that is not [C] has another shape
csrc/autograd.cpp test_backward::test_parameters_of_two_dimensions
- bias->reshape({-1}) : bias
+ *bias : bias

grad-bias-shape-by-python: the same where Python calls the ops
bnext/function.py test_routes::test_same_bits
- else grad.reshape(shape)
+ else grad

eps-ignored: the function takes its default eps
bnext/functional.py test_forward::test_eps
- None, training, momentum, eps, None,
+ None, training, momentum, 1e-5, None,

tracking-ignored: a layer moves its buffers whatever track_running_stats says
bnext/modules.py test_running_stats::test_flipping_states
- module.track_running_stats and not
+ not

refused-not-counted: a batch that is refused is not counted
bnext/modules.py test_running_stats::test_the_counter_moves_where_the_batch_is_refused
- counter.add_(1)
+ pass

none-without-counter: momentum=None without a counter is no momentum of 0
bnext/modules.py test_running_stats::test_momentum_none_without_a_counter
- momentum = 0.0
+ momentum = 0.1

recomputation-counts: a layer that is computed again for its backward counts again
bnext/modules.py test_checkpoint::test_a_network
- and not recomputation.active
+ and True

recomputation-everywhere: while one thread computes again, none counts
bnext/recomputation.py test_checkpoint::test_other_threads_count_meanwhile
- class _Recomputation(threading.local):
+ class _Recomputation:

recomputation-forgets: a recomputation ends with another inside it
bnext/recomputation.py test_checkpoint::test_one_recomputation_within_another
- self.active = self._outer.pop()
+ self.active = False

always-torch: torch's own batch norm runs every time
bnext/fallbacks.py test_forward::test_no_buffers
-     return None
+     return "a whim"

never-while-tracing: a trace holds bnext's ops
bnext/fallbacks.py test_fallbacks::test_trace
- if torch._C._get_tracing_state() is not None:
+ if False:

fake-dtype: the fake kernel's statistics are float32 for float64
bnext/ops.py test_ops::test_meta_agrees_with_the_kernels
- dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
+ dtype = torch.float32

fake-strides: the fake kernel's output is contiguous
bnext/ops.py test_ops::test_meta_agrees_with_the_kernels
- return formats[input.dim()]
+ return torch.contiguous_format

batches-merged-as-equals: update_bn takes no note of how many values a batch has
bnext/reference.py test_recalibrate::test_of_batches_as_of_one
- mean = a.mean + delta * (b.count / count)
+ mean = a.mean + delta / 2

spread-of-batches-dropped: update_bn leaves out what the means of batches differ by
bnext/reference.py test_recalibrate::test_of_batches_as_of_one
-  + delta.square() * (a.count * b.count / count)

modes-kept-after-an-error: where the loader fails, update_bn leaves the model as it was during the pass
bnext/recalibrate.py test_recalibrate_loaders::test_after_an_error_all_is_as_before
-     try:
-         for change in changes:
-             setattr(*change)
-         yield
-     finally:
+     for change in changes:
+         setattr(*change)
+     yield
+     if True:

drawn-in-vain: update_bn draws one batch more than it is told to
bnext/recalibrate.py test_recalibrate_loaders::test_no_batch_is_drawn_in_vain
- islice(loader, num_batches)
+ (b for n, b in enumerate(loader) if num_batches is None or n < num_batches)

convert-copies: convert_batchnorm copies the parameters
bnext/convert.py test_convert::test_same_objects
- layer.__class__ = classes[type(layer)]
+ layer.__class__ = classes[type(layer)]
+             layer.weight = layer.weight if layer.weight is None else nn.Parameter(layer.weight.detach().clone())

convert-silent: layers that are left as they are are not named
bnext/convert.py test_convert::test_others_are_left_alone_and_named
- if left:
+ if False:

convert-shadowed: a layer with a forward of its own changes class, and runs the old one
bnext/convert.py test_convert::test_a_forward_of_its_own_is_left_alone_and_named
-  and "forward" not in vars(layer)

revert-thaws: revert_batchnorm makes frozen layers torch's
bnext/convert.py test_unfreeze::test_reverting_would_thaw_and_is_refused
- if layer.frozen_stats or layer.frozen_affine]
+ if False]

frozen-trains: a frozen layer is in training as its flag says
bnext/modules.py test_freeze::test_what_trains_and_what_stays
- if module.frozen_stats:
-         training = False
+ if False:
+         training = False

frozen-thaws-in-fallbacks: torch's own forward runs of a frozen layer
bnext/modules.py test_freeze::test_frozen_where_torchs_own_runs
- return module._torch_frozen_forward(input)
+ return _BatchNorm.forward(module, input)

frozen-not-scripted: torch.jit.script is not told that frozen_stats is a constant of the class
bnext/modules.py test_fallbacks::test_script
- (*_BatchNorm.__constants__, "frozen_stats", "skip_nonfinite")
+ _BatchNorm.__constants__

frozen-resets: reset_running_stats resets frozen statistics
bnext/modules.py test_freeze::test_other_peoples_recalibration_leaves_it
- if not self.frozen_stats:
+ if True:

freeze-forgets-ties: a parameter of two layers is switched off before the second has noted it
bnext/freeze.py test_unfreeze::test_tied_parameters
-     for layer in layers.values():
-         for p in layer.parameters():
+         for p in layer.parameters():

freeze-forgets-itself: freezing again takes what it finds for what was before
bnext/freeze.py test_unfreeze::test_unfreezing_restores_what_each_parameter_was
-  or name in layer.frozen_affine

freeze-leaves-gradients: weight decay reaches frozen parameters by a gradient from before
bnext/freeze.py test_freeze::test_no_gradient_is_left_behind_for_weight_decay
- p.requires_grad_(False).grad = None
+ p.requires_grad_(False)

unfreeze-everything: what was off before it was frozen is on afterwards
bnext/freeze.py test_unfreeze::test_unfreezing_restores_what_each_parameter_was
- if name in layer.frozen_affine:
+ if True:

freeze-silent: layers that cannot be frozen are not named
bnext/freeze.py test_freeze::test_what_is_not_frozen_is_named
- if left:
+ if False:
"""

MUTATIONS = [parse(block) for block in _TABLE.strip().split("\n\n")]
