// What a session tells whoever listens, as it happens.
#pragma once

#include <functional>

namespace ojfa::core {

struct Event {
    enum class Kind { exit_taken, draft_checked, shadow_check } kind;
    int row;                        // which sequence
    int position = 0;               // of the token that it follows, from 0
    int blocks_run = 0;             // blocks that computed it
    int drafted = 0, accepted = 0;  // of a draft that was checked
    bool agrees = false;            // of a shadow check
};

using Listener = std::function<void(const Event&)>;

}  // namespace ojfa::core
