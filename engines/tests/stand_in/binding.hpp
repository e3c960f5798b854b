// Kernels of the stand-in as functions with the parameters of those in engines/kernels.
#pragma once

#include <tuple>
#include <utility>

#include "device.hpp"

namespace stand_in {

inline std::size_t at(std::int64_t index) {
    return static_cast<std::size_t>(index);
}

// Binds a function's arguments when a kernel is launched, and runs it later.
template <class... Parameters, std::size_t... Index>
Kernel kernel(void (*function)(Program&, const Launch&, Parameters...), std::index_sequence<Index...>) {
    return {{sizeof(Parameters)...},
            [function](Program& program, const Launch& launch, [[maybe_unused]] void** arguments) -> Work {
                const std::tuple<Parameters...> bound(*static_cast<Parameters*>(arguments[Index])...);
                return [function, &program, launch, bound] {
                    function(program, launch, std::get<Index>(bound)...);
                };
            }};
}

template <class... Parameters>
Kernel kernel(void (*function)(Program&, const Launch&, Parameters...)) {
    return kernel(function, std::index_sequence_for<Parameters...>());
}

}  // namespace stand_in
