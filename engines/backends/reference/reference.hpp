// The reference backend: a bundle's portable graphs computed on the CPU, sums in double, hidden states and
// caches in fp32. It is exact and slow, needs no engines, and is what the runtime is tested with.
#pragma once

#include "backend/backend.hpp"

namespace ojfa::core {

const BackendEntry& reference_backend();

}  // namespace ojfa::core
