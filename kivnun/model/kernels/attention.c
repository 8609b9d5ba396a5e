/* Causal attention of packed rows: what the kernels of both types share. What is computed stands in attention.inc, and how
 * matrices are multiplied in cells.h. */
#include <stdlib.h>

#include "cells.h"

/* Queries and keys that meet at once: their scores and what they multiply stay in the second-level cache. Scores lie PITCH apart,
 * since rows a power of two apart would share few places in the first. */
enum { QUERIES = 96, KEYS = 256, PITCH = KEYS + LANES };
#define LOWEST -1e38f /* below every score; finite, so that two of them have a difference */

/* One pass. Strides are in elements; `*_stride` goes to the next token, `*_head` to the next head. `window` 0 means none. */
struct attention {
  const void *q, *k, *v;
  void *out;
  const void *dout;
  void *dq, *dk, *dv;
  float *lse;              /* [heads, tokens]: log of the sum of exp(scale * score) */
  const float *cos, *sin;  /* [tokens, angle_stride], the first rot / 2 of each used */
  int64_t q_stride, k_stride, v_stride, out_stride, dq_stride, dk_stride, dv_stride;
  int64_t q_head, k_head, v_head, dq_head, dk_head, dv_head;
  int64_t tokens, angle_stride, window;
  int groups, per_group, head_dim, width, rot;
  float scale;
};

/* A run of tokens that rows have in common, or what one row has alone. Its queries see the keys of the branches it continues, up to
 * the root, and its own up to themselves. `begin` and `depth` are its first token's place in the tree and in its rows; `keys` is
 * where its keys begin in the scratch, at a whole vector. */
struct branch {
  int64_t begin, length, depth, keys;
  const struct branch *continues; /* 0: it is a root */
};

/* Branches laid end to end, each after the one it continues: rows that begin alike, or one row by itself. */
struct tree {
  const struct branch *branches;
  int64_t start, count, keys; /* its first token in the pack, how many branches, its keys in whole vectors */
};

/* Queries and keys are counted from the start of the branch of the keys, wherever the queries are. */
static inline int64_t lowest_key(const struct attention *a, int64_t query) {
  return a->window ? most(query - a->window + 1, 0) : 0;
}

static inline int64_t first_key(const struct attention *a, int64_t query) { return lowest_key(a, query) / LANES * LANES; }

static inline void *take(char **scratch, int64_t cells) {
  void *here = *scratch;
  *scratch += (sizeof(cell) * cells + 63) / 64 * 64;
  return here;
}

/* What a strip of queries sees of a block of keys. Row r sees the keys [low + r, high + r) and none from `limit` on, counted from
 * `first`; where there is no window, `low` does not count. Computed are `count` keys from `first` on, whole vectors, and none where
 * that is not positive. */
struct sight {
  int64_t rows, first, end, count, low, high, limit;
  int windowed;
};

static inline struct sight sight_of(const struct attention *a, const struct branch *p, int64_t query, int64_t rows, int64_t block) {
  int64_t first = most(first_key(a, query), block), end = least(least(query + rows, p->length), block + KEYS);
  int64_t low = query + 1 - a->window - first, high = query + 1 - first;
  return (struct sight){rows, first, end, whole(end - first), low, high, p->length - first, a->window != 0};
}

static inline int all_see(const struct sight *s, int64_t j) {
  return j + LANES <= least(s->high, s->limit) && (!s->windowed || j >= s->low + s->rows - 1);
}

static inline vec as_seen(const struct sight *s, int64_t row, int64_t j, vec x, float otherwise) {
  return within(x, s->windowed ? s->low + row - j : 0, least(s->high + row, s->limit) - j, otherwise);
}

/* Scores become 2^(scale * (score - highest)) as cells, zero where not seen, with the highest of each row so far. When that rises,
 * the sum so far and the output so far shrink; `out` is null while there is none (Milakov and Gimelshein 2018, "Online normalizer
 * calculation for softmax"). */
ALWAYS void softmax(const int grain, const struct sight *s, float *scores, float scale, float *highest, float *sum, float *out, int K,
                    cell *p) {
  vec top[TILE_ROWS], total[TILE_ROWS], before = vec_at(highest), now = before;
  for (int64_t row = 0; row < s->rows; row++) top[row] = vec_of(highest[row]), total[row] = (vec){0};
  for (int64_t j = 0; j < s->count; j += LANES)
    for (int64_t row = 0, all = all_see(s, j); row < s->rows; row++) {
      vec x = vec_at(scores + row * PITCH + j);
      top[row] = larger(all ? x : as_seen(s, row, j, x, LOWEST), top[row]);
    }
  for (int64_t row = 0; row < s->rows; row++) now[row] = largest_of(top[row]);
  vec shrink = exp2_of_each((before - now) * scale);
  for (int64_t j = 0; j < s->count; j += LANES)
    for (int64_t row = 0, all = all_see(s, j); row < s->rows; row++) {
      vec x = exp2_of_each((vec_at(scores + row * PITCH + j) - now[row]) * scale);
      if (!all) x = as_seen(s, row, j, x, 0.0f);
      total[row] += x;
      put_row(grain, x, p + (row * PITCH + j) / grain);
    }
  for (int64_t row = 0; row < s->rows; row++) {
    sum[row] = (out ? sum[row] * shrink[row] : 0.0f) + sum_of(total[row]);
    highest[row] = now[row];
    for (int64_t d = 0; out && shrink[row] != 1.0f && d < K; d += LANES)
      put_vec(out + row * K + d, vec_at(out + row * K + d) * shrink[row]);
  }
}

/* Scores become probabilities p, and dp becomes the scores' gradient p * (dp - pull) * scale; both zero where not seen. */
static inline void softmax_backward(const struct sight *s, float *scores, float *dp, float scale, const float *lse, const float *pull) {
  for (int64_t row = 0; row < s->rows; row++, scores += PITCH, dp += PITCH) {
    vec log_sum = vec_of(lse[row] * LOG2_E), pulled = vec_of(pull[row]);
    for (int64_t j = 0; j < s->count; j += LANES) {
      vec p = exp2_of_each(vec_at(scores + j) * (scale * LOG2_E) - log_sum);
      if (!all_see(s, j)) p = as_seen(s, row, j, p, 0.0f);
      put_vec(scores + j, p);
      put_vec(dp + j, p * ((vec_at(dp + j) - pulled) * scale));
    }
  }
}

/* A strip's p and ds as cells: both stacked, for what keys and values get, and ds by row, for what the queries get. */
ALWAYS void put_strip(const int grain, const struct sight *s, float *p, float *ds, cell *p_stack, cell *ds_stack, cell *ds_rows) {
  if (s->rows % 2) {
    memset(p + s->rows * PITCH, 0, sizeof(float) * s->count);
    memset(ds + s->rows * PITCH, 0, sizeof(float) * s->count);
  }
  for (int64_t row = 0; row < s->rows; row += 2)
    for (int64_t j = 0; j < s->count; j += LANES) {
      int64_t at = row * PITCH + j, stacked = row / grain * PITCH + j;
      vec x = vec_at(ds + at), y = vec_at(ds + at + PITCH);
      put_stack(grain, vec_at(p + at), vec_at(p + at + PITCH), p_stack + stacked, PITCH);
      put_stack(grain, x, y, ds_stack + stacked, PITCH);
      put_row(grain, x, ds_rows + at / grain);
      put_row(grain, y, ds_rows + (at + PITCH) / grain);
    }
}

static int64_t scratch_bytes(int64_t keys, int width) {
  int64_t of_tree = 5 * keys * width, of_block = QUERIES * (3 * width + 2 * PITCH);
  int64_t of_strip = 3 * TILE_ROWS * PITCH + LANES * width;
  return (int64_t)sizeof(float) * (of_tree + of_block + of_strip) + 16 * 64;
}

/* Lays out the branches, each after its parent, -1 for none (parents 0: none has one), as trees. Returns how many. */
static int64_t trees_of(const int64_t *lengths, const int64_t *parents, int64_t count, struct branch *branches, struct tree *trees) {
  int64_t found = 0;
  for (int64_t i = 0, start = 0; i < count; start += lengths[i++]) {
    int64_t parent = parents ? parents[i] : -1;
    if (parent < 0) trees[found++] = (struct tree){branches + i, start, 0, 0};
    struct tree *t = trees + found - 1;
    struct branch *p = branches + i;
    *p = (struct branch){.begin = start - t->start, .length = lengths[i], .keys = t->keys};
    if (parent >= 0) p->continues = branches + parent, p->depth = p->continues->depth + p->continues->length;
    t->count++;
    t->keys += whole(p->length);
  }
  return found;
}

typedef void (*tree_kernel)(const struct attention *, const struct tree *, int, char *);

/* Runs a kernel over every (tree, key/value head). Returns 1 when there is no memory for its scratch. */
static int over_trees(const struct attention *a, const int64_t *lengths, const int64_t *parents, int64_t count, int threads,
                      tree_kernel kernel) {
  struct branch *branches = malloc(sizeof(struct branch) * (count + 1));
  struct tree *trees = malloc(sizeof(struct tree) * (count + 1));
  int failed = !branches || !trees;
  int64_t found = failed ? 0 : trees_of(lengths, parents, count, branches, trees), keys = 0;
  for (int64_t i = 0; i < found; i++) keys = most(keys, trees[i].keys);
#pragma omp parallel num_threads(threads)
  {
    char *scratch = aligned_alloc(64, (scratch_bytes(keys, a->width) + 63) / 64 * 64);
    if (!scratch) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < found * a->groups; task++)
      if (scratch) kernel(a, trees + task / a->groups, (int)(task % a->groups), scratch);
    free(scratch);
  }
  free(branches);
  free(trees);
  return failed;
}

#define KERNELS "attention.inc"
#include "both_types.h"
