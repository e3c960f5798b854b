// What the stand-ins for driver and TensorRT share: putting work on a stream, and programs made for a model.
#pragma once

#include <cuda.h>

#include <functional>
#include <map>
#include <string>

namespace stand_in {

using Work = std::function<void()>;

// Does work when the stream comes to it: no earlier than somebody waits for it.
void put(CUstream stream, Work work);

// A compiled program, or an engine: in place of its code what it was compiled for, a name and a number a
// line.
struct Program {
    std::map<std::string, int> numbers;
    int called_off = 0;

    // Throws std::runtime_error where it isn't one.
    static Program parse(const char* text, std::size_t most);

    int at(const std::string& name) const { return numbers.at(name); }

    // An element of a matrix, of the cache, or between two kernels.
    float read(const void* elements, std::size_t index) const;
    void write(void* elements, std::size_t index, float value) const;
    std::size_t element_bytes() const { return at("HALF") ? 2 : 4; }
};

// Grid and, of kernels with a number of tokens in their name, that number.
struct Launch {
    int x, y, z, tokens;
};

struct Kernel {
    std::vector<std::size_t> sizes;  // of its parameters
    std::function<Work(Program&, const Launch&, void** arguments)> bind;
};

// By name, without the number of tokens at its end.
const std::map<std::string, Kernel>& kernels();

// The others and those with a block's matrices.
std::map<std::string, Kernel> with_products(std::map<std::string, Kernel> kernels);

// Parts of the kernels, for engines.
void norm_linear(const Program& program, float* out, const float* hidden, int tokens, const float* weight,
                 const float* bias, float epsilon, int width, const void* matrix, const float* add,
                 int columns, int outputs);
void norm_up(const Program& program, void* inner, const float* hidden, int tokens, const float* weight,
             const float* bias, float epsilon, const void* matrix, const float* add, int columns, int width);
void linear(const Program& program, float* out, const float* residual, const void* x, int tokens,
            const void* matrix, const float* add, int columns, int outputs);

}  // namespace stand_in

// For tests, found by dlsym.
extern "C" {
// The nth call of the driver from now on fails with this result, and, if `stays`, all later ones.
void stand_in_fail(int call, CUresult result, int stays);
// Calls so far.
long stand_in_calls();
// Bytes and objects that are not given back.
long stand_in_held();
}
