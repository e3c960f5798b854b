/* The header is one of C: a whole generation from C. Gives the number of tokens, or the negated status. */
#include "ojfa/ojfa.h"

int generate_from_c(const char* bundle) {
    ojfa_load_options load;
    ojfa_load_options_init(&load);
    load.backend = "reference";
    ojfa_model model;
    ojfa_status status = ojfa_model_load(bundle, &load, &model);
    if (status != OJFA_OK) return -(int)status;
    ojfa_session session;
    status = ojfa_session_open(model, NULL, &session);
    if (status != OJFA_OK) return -(int)status;
    const int32_t ids[] = {5, 6, 7};
    const ojfa_tokens prompt = {ids, 3};
    ojfa_generation generation;
    status = ojfa_generation_start(session, &prompt, NULL, &generation);
    int count = 0;
    for (int more = 1; status == OJFA_OK && more;) {
        ojfa_step step;
        status = ojfa_generation_next(generation, &step, &more);
        count += more;
    }
    ojfa_generation_close(generation);
    ojfa_session_close(session);
    ojfa_model_close(model);
    return status == OJFA_OK ? count : -(int)status;
}
