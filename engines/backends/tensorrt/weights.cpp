#include "weights.hpp"

#include <algorithm>
#include <cstring>

#include "failure.hpp"

namespace ojfa::tensorrt {
namespace {

constexpr std::size_t ROW_BYTES = 16;  // of what a kernel loads at once

unsigned tiles(std::int64_t length) {
    return static_cast<unsigned>((length + 31) / 32);
}

}  // namespace

WeightStore::WeightStore(Device& device, const core::HeldFiles& files,
                         const std::map<std::string, std::unique_ptr<Kernels>>& kernels)
    : device_(device), files_(files), kernels_(kernels), stream_(device), lanes_(device) {}

Arrays WeightStore::load(const Plan& plan) {
    Arrays arrays;
    for (const auto& [name, weight] : plan.weights) arrays[name] = get(weight);
    return arrays;
}

Array WeightStore::get(const Weight& weight) {
    const Place place = {weight.file, weight.offset};
    const auto found = held_.find(place);
    if (found != held_.end()) return found->second;
    return held_[place] = read(weight);
}

Array WeightStore::read(const Weight& weight) {
    Array stored = {std::make_shared<Buffer>(device_, weight.bytes()), weight.shape};
    core::HeldFile file = files_.open(weight.file, weight.offset);
    Uploading uploading(lanes_, {{weight.offset, weight.bytes(), stored.address()}}, weight.offset);
    for (std::uint64_t left = weight.bytes(); left;) {
        const core::Span<char> room = uploading.room();
        const std::size_t wanted = std::min<std::uint64_t>(room.size(), left);
        if (file.read({room.data(), wanted}) != wanted)
            throw core::bundle_failure((files_.directory() / weight.file).string() + " ends too early",
                                       "copy the bundle again whole");
        uploading.take(wanted);
        left -= wanted;
    }
    uploading.finish();
    return arranged(weight, std::move(stored));
}

// As the device wants it.
Array WeightStore::arranged(const Weight& weight, Array stored) {
    if (!weight.transposed) return stored;
    const std::int64_t rows = weight.shape[0], columns = weight.shape[1];
    Array turned = {std::make_shared<Buffer>(device_, weight.bytes()), {columns, rows}};
    kernels_.at(weight.precision)
        ->launch(stream_.handle(), {"transpose", {tiles(columns), tiles(rows), 1}, {32, 8}}, turned.address(),
                 stored.address(), static_cast<int>(rows), static_cast<int>(columns));
    stream_.synchronize();
    return turned;
}

// Weights on their way while their files are read; they are held when all is done.
class WeightStore::WhileRead : public core::Loading {
 public:
    WhileRead(WeightStore& store, const std::vector<const Plan*>& plans) : store_(store) {
        for (const Plan* const plan : plans)
            for (const auto& [name, weight] : plan->weights) {
                const Place place = {weight.file, weight.offset};
                if (store.held_.count(place) || coming_.count(place)) continue;
                Array stored = {std::make_shared<Buffer>(store.device_, weight.bytes()), weight.shape};
                files_[weight.file].push_back({weight.offset, weight.bytes(), stored.address()});
                coming_.emplace(place, Coming{weight, std::move(stored)});
            }
    }

    std::unique_ptr<core::Receiver> receive(const std::string& name) override {
        const auto found = files_.find(name);
        if (found == files_.end()) return nullptr;
        store_.device_.make_current();
        return std::make_unique<Uploading>(store_.lanes_, found->second);
    }

    void end() override {
        store_.device_.make_current();
        for (auto& [place, coming] : coming_)
            store_.held_[place] = store_.arranged(coming.weight, std::move(coming.stored));
    }

 private:
    struct Coming {
        const Weight& weight;
        Array stored;
    };

    WeightStore& store_;
    std::map<Place, Coming> coming_;
    std::map<std::string, std::vector<Destination>> files_;
};

std::unique_ptr<core::Loading> WeightStore::begin_loading(const std::vector<const Plan*>& plans) {
    return std::make_unique<WhileRead>(*this, plans);
}

std::vector<float> WeightStore::values(const Weight& weight) const {
    if (weight.precision != "fp32")
        throw core::bundle_failure("a weight that must be fp32 is not", "rebuild the engines");
    const std::vector<char> stored = files_.read(weight.file, weight.offset, weight.bytes());
    std::vector<float> values(weight.count());
    std::memcpy(values.data(), stored.data(), weight.bytes());
    return values;
}

Array WeightStore::upload(const std::vector<float>& values) {
    Array array = {std::make_shared<Buffer>(device_, values.size() * sizeof(float)),
                   {static_cast<std::int64_t>(values.size())}};
    stream_.upload(values.data(), array.address(), values.size() * sizeof(float));
    stream_.synchronize();
    return array;
}

Array WeightStore::padded(const Weight& weight, bool turned, float factor, bool pad_rows) {
    const std::vector<char> stored = files_.read(weight.file, weight.offset, weight.bytes());
    const std::size_t width = weight.element_bytes(), step = ROW_BYTES / width;
    const auto stored_rows = static_cast<std::size_t>(weight.shape.at(0));
    const auto stored_columns = static_cast<std::size_t>(weight.shape.at(1));
    const std::size_t rows = turned ? stored_columns : stored_rows,
                      columns = turned ? stored_rows : stored_columns;
    const auto filled = [step](std::size_t length) { return (length + step - 1) / step * step; };
    const std::size_t all_rows = pad_rows ? filled(rows) : rows, all_columns = filled(columns);
    std::vector<char> whole(all_rows * all_columns * width);
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t column = 0; column < columns; ++column) {
            const std::size_t from = turned ? column * stored_columns + row : row * stored_columns + column;
            char* const to = whole.data() + (row * all_columns + column) * width;
            std::memcpy(to, stored.data() + from * width, width);
            if (factor == 1 || width != sizeof(float)) continue;
            float value;
            std::memcpy(&value, to, sizeof value);
            value *= factor;
            std::memcpy(to, &value, sizeof value);
        }
    Array array = {std::make_shared<Buffer>(device_, whole.size()),
                   {static_cast<std::int64_t>(all_rows), static_cast<std::int64_t>(all_columns)}};
    stream_.upload(whole.data(), array.address(), whole.size());
    stream_.synchronize();
    return array;
}

}  // namespace ojfa::tensorrt
