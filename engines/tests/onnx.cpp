#include "bundle/onnx.hpp"

#include <stdexcept>

#include "fixtures.hpp"

using ojfa::core::read_graph;

namespace {

std::map<std::string, ojfa::core::WeightPlace> tensors_of(const std::string& model) {
    return read_graph({reinterpret_cast<const unsigned char*>(model.data()), model.size()}).weights;
}

}  // namespace

TEST(OnnxFiles, SayWhereWeightsAre) {
    const auto tensors = tensors_of(fixtures::read(fixtures::vectors("gpt2.ojfa") / "graphs/block_01.onnx"));
    EXPECT_EQ(tensors.size(), 12u);
    const auto& qkv = tensors.at("attention.qkv.weight");
    EXPECT_EQ(qkv.file, "block_01.bin");
    EXPECT_TRUE(qkv.half);
    EXPECT_EQ(qkv.shape, (std::vector<std::int64_t>{32, 96}));
    EXPECT_EQ(qkv.length, 2u * 32 * 96);
    EXPECT_FALSE(tensors.at("attention.norm.weight").half);
}

TEST(OnnxFiles, DamagedOnesAreRefusedOrReadInBounds) {
    std::mt19937 random = fixtures::random_numbers();
    const std::string model = fixtures::read(fixtures::vectors("llama.ojfa") / "graphs/block_00.onnx");
    int refused = 0;
    for (int i = 0; i < 2000; ++i) {
        std::string altered = model.substr(0, 1 + random() % model.size());
        for (int change = 0; change < 3; ++change)
            altered[random() % altered.size()] = static_cast<char>(random());
        try {
            tensors_of(altered);
        } catch (const std::runtime_error&) {
            ++refused;
        }
    }
    EXPECT_GT(refused, 1000);
}
