// Whether a bundle's portable graphs are those of the model that its manifest describes.
#pragma once

#include <map>
#include <string>

#include "bundle/manifest.hpp"
#include "bundle/onnx.hpp"

namespace ojfa::core {

using WeightPlaces = std::map<std::string, WeightPlace>;

// The weights of a graph, their files named as in the manifest. Throws std::runtime_error where one is
// missing, unknown, of another shape or precision than the model's, or outside the graph's files.
WeightPlaces checked_weights(const Manifest& manifest, const GraphEntry& entry, const Graph& graph);

// Throws std::runtime_error where the manifest's rotary tables aren't those of the embed graph.
void check_rotary_places(const Manifest& manifest, const WeightPlaces& embed);

}  // namespace ojfa::core
