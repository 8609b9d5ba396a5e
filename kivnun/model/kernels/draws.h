/* The random numbers of dropout.py: SplitMix64's finaliser of a token's key and a counter. One draw of 64 bits decides four channels,
 * 16 bits each, little end first; a channel stays where its bits reach the limit. */
#ifndef KIVNUN_DRAWS_H
#define KIVNUN_DRAWS_H

#include <stdint.h>

#define GOLDEN 0x9E3779B97F4A7C15u

/* As a macro it serves numbers and vectors of numbers alike. */
#define MIX(z)                                   \
  do {                                           \
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;   \
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;   \
    z = z ^ (z >> 31);                           \
  } while (0)

/* The key of a token at a site. */
static inline uint64_t key_at_site(int64_t key, int64_t site) {
  uint64_t z = (uint64_t)key ^ (uint64_t)site;
  MIX(z);
  return z;
}

/* The draw of channels 4 * group to 4 * group + 3. */
static inline uint64_t draw(uint64_t key, int64_t group) {
  uint64_t z = key + (uint64_t)group * GOLDEN;
  MIX(z);
  return z;
}

#endif
