// The parts of a manifest, one reader each. Those that the runtime has no use for are only checked.
#pragma once

#include "bundle/fields.hpp"
#include "bundle/manifest.hpp"

namespace ojfa::core {

ModelSpec read_model(Fields fields);
RotaryTables read_rotary(Fields fields);
GraphEntry read_graph(Fields fields);
EngineSet read_engines(Fields fields);
Shortcut read_shortcut(Fields fields);
Golden read_golden(Fields fields);
Policy read_policy(Fields fields);
Default read_default(Fields fields);
FileEntry read_file_entry(Fields fields);
void check_calibration(Fields fields);
void check_promise(Fields fields);
void check_generation(Fields fields, int vocab_size);
void check_built(Fields fields);

}  // namespace ojfa::core
