/* The C interface to early-exit bundles; see engines/README.md.
 *
 * Conventions that hold for every function here:
 * - It returns OJFA_OK or an error. ojfa_last_error and ojfa_last_hint then say what happened, in the calling
 *   thread, until that thread's next failed call. No C++ exception leaves a function.
 * - Handles are numbers: a null, closed or made-up one is refused with OJFA_ERROR_USAGE. What is closed while
 *   another thread is inside a call stays alive until that call returns.
 * - Memory that is passed in belongs to the caller and is not kept after the call, unless stated.
 * - Token ids in, token ids out: text stays with the caller's tokenizer.
 * - Exits count blocks run, from 1 to the model's number of blocks, which is its own head.
 * - A model may be used by any number of threads. A session, with its generations, is used by one thread at a
 *   time, whichever: a second one is refused with OJFA_ERROR_BUSY. ojfa_session_cancel may be called at any
 * time.
 */
#ifndef OJFA_OJFA_H
#define OJFA_OJFA_H

#include <stddef.h>
#include <stdint.h>

#if defined(OJFA_BUILDING)
#define OJFA_API __attribute__((visibility("default")))
#else
#define OJFA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ojfa_status {
    OJFA_OK = 0,
    OJFA_ERROR_USAGE = 1,         /* an argument that can't be right: null, out of range, a closed handle */
    OJFA_ERROR_BUNDLE = 2,        /* a bundle that is incomplete, altered, or of another version */
    OJFA_ERROR_BACKEND = 3,       /* a backend that is missing, or can't run what it was given */
    OJFA_ERROR_OUT_OF_MEMORY = 4, /* the session failed and stays usable, the model goes on */
    OJFA_ERROR_CANCELLED = 5, /* ojfa_session_cancel was called; the session is as it was before the call */
    OJFA_ERROR_BUSY = 6,      /* another thread is using the session */
    OJFA_ERROR_INTERNAL = 7   /* a mistake in this library: please report it */
} ojfa_status;

/* Handles; id 0 is null. */
typedef struct ojfa_model {
    uint64_t id;
} ojfa_model;
typedef struct ojfa_session {
    uint64_t id;
} ojfa_session;
typedef struct ojfa_generation {
    uint64_t id;
} ojfa_generation;

#define OJFA_EXIT_FULL 0       /* all blocks */
#define OJFA_EXIT_AUTO (-1)    /* decided for each token by the bundle's policy; generations only */
#define OJFA_EXIT_DEFAULT (-2) /* what the build planned, see docs/planning.md; generations only */

/* The library's version, "0.1.0"; never null, lives as long as the process. Any thread. */
OJFA_API const char* ojfa_version(void);

/* The sentence and the hint of this thread's last failed call; never null, perhaps empty. Valid until the
 * thread's next failed call. */
OJFA_API const char* ojfa_last_error(void);
OJFA_API const char* ojfa_last_hint(void);

/* ---- Models ---- */

typedef struct ojfa_load_options {
    size_t struct_size;  /* sizeof(ojfa_load_options), set by ojfa_load_options_init */
    const char* backend; /* "tensorrt" [default] or "reference", exact and slow, on the CPU */
    const char*
        backend_library; /* path of the backend's library; null: beside this one, then as the linker finds */
    int device;          /* which GPU, from 0 */
    uint64_t memory_limit; /* bytes that the model and its sessions may take on the device; 0: no limit */
    int check_golden;      /* whether to generate the manifest's golden tokens and compare [1] */
    /* Told how many bytes of the bundle were checked; may be null. One call at a time, from any thread. */
    void (*progress)(void* user, uint64_t done, uint64_t total);
    void* user;
    int32_t blocks; /* upload the first so many on the way, OJFA_EXIT_FULL for all; negative: none [-1] */
} ojfa_load_options;

OJFA_API void ojfa_load_options_init(ojfa_load_options* options);

/* Opens a bundle directory: checks every file against the manifest, loads the backend and opens the engines.
 * The handle is closed with ojfa_model_close. Any thread. Blocks that
 * weren't asked for are uploaded when a token first needs them. */
OJFA_API ojfa_status ojfa_model_load(const char* bundle, const ojfa_load_options* options, ojfa_model* model);

/* Closes the handle; the model's memory is freed with its last session. Any thread. */
OJFA_API ojfa_status ojfa_model_close(ojfa_model model);

typedef struct ojfa_model_info {
    int32_t blocks;         /* exits are 1 to this */
    int32_t hidden_size;    /* features of a hidden state */
    int32_t vocab_size;     /* V: a row of logits has V floats */
    int32_t max_length;     /* tokens that a sequence may hold */
    int32_t max_batch_size; /* sequences of a session */
    int32_t auto_exits;     /* exits of the bundle's policy; -1 where it has none */
    int32_t eos_tokens;     /* ids that end a text */
} ojfa_model_info;

/* Any thread. */
OJFA_API ojfa_status ojfa_model_get_info(ojfa_model model, ojfa_model_info* info);

/* Uploads the embedding and the first `depth` blocks now. Any thread. */
OJFA_API ojfa_status ojfa_model_load_blocks(ojfa_model model, int32_t depth);

/* Bytes on the device that the model and its sessions hold now. Any thread. */
OJFA_API ojfa_status ojfa_model_memory(ojfa_model model, uint64_t* bytes);

/* What the backend is and runs on, as JSON; copied with its final zero. `size` receives the bytes needed.
 * Any thread. */
OJFA_API ojfa_status ojfa_model_backend(ojfa_model model, char* json, size_t capacity, size_t* size);

typedef enum ojfa_measure {
    OJFA_MEASURE_TOP = 0,    /* the largest probability */
    OJFA_MEASURE_MARGIN = 1, /* what it has above the second largest */
    OJFA_MEASURE_ENTROPY = 2 /* the negated entropy, nats */
} ojfa_measure;

/* When a token may leave early: after exits[i] blocks where its confidence reaches thresholds[i]. */
typedef struct ojfa_policy {
    const int32_t* exits;     /* increasing, below the number of blocks */
    const double* thresholds; /* finite */
    size_t count;
    int32_t measure; /* an ojfa_measure */
} ojfa_policy;

/* The bundle's own policy; its arrays live as long as the model's handle is open. Any thread. */
OJFA_API ojfa_status ojfa_model_policy(ojfa_model model, ojfa_policy* policy);

/* ---- Sessions ---- */

typedef struct ojfa_session_options {
    size_t struct_size;    /* set by ojfa_session_options_init */
    int32_t batch_size;    /* sequences [1] */
    int32_t max_length;    /* tokens that each may hold; 0: what the bundle was built for */
    double shadow_share;   /* probability that a token is chosen for a shadow check; 0: none are [0]. Such a
                              session refuses to speculate, whose tokens are those of full depth */
    uint64_t shadow_seed;  /* of that choice */
    uint32_t shadow_index; /* which session of the seed, from 0, as those of a Monitor in Python */
} ojfa_session_options;

OJFA_API void ojfa_session_options_init(ojfa_session_options* options);

/* Starts sequences: a cache and a stream of their own, on the model's weights. Closed with
 * ojfa_session_close, and the model may be closed before. Any thread. */
OJFA_API ojfa_status ojfa_session_open(ojfa_model model, const ojfa_session_options* options,
                                       ojfa_session* session);
OJFA_API ojfa_status ojfa_session_close(ojfa_session session);

/* Makes the call in progress, or the next one that computes, return OJFA_ERROR_CANCELLED, once. Any thread.
 */
OJFA_API ojfa_status ojfa_session_cancel(ojfa_session session);

/* New tokens of one sequence. */
typedef struct ojfa_tokens {
    const int32_t* ids;
    size_t count; /* 0: the sequence stays as it is */
} ojfa_tokens;

/* Appends tokens and runs them through the first `exit` blocks; what waits from earlier exits catches up.
 *   tokens    [batch]
 *   exit      1..blocks, or OJFA_EXIT_FULL
 *   logits    [batch, V] fp32 for the token after each sequence's last; zero for sequences without new
 * tokens; may be null, which saves the copy capacity  floats that `logits` has room for likeliest [batch] its
 * likeliest token, -1 for sequences without new tokens; may be null Where it fails the session is as before.
 */
OJFA_API ojfa_status ojfa_session_advance(ojfa_session session, const ojfa_tokens* tokens, int32_t exit,
                                          float* logits, size_t capacity, int32_t* likeliest);

/* The same, with the logits of every new token, one sequence after the other: [all new tokens, V]. Shadow
 * checks choose none of them. */
OJFA_API ojfa_status ojfa_session_advance_every(ojfa_session session, const ojfa_tokens* tokens, int32_t exit,
                                                float* logits, size_t capacity);

/* Appends tokens and runs each sequence until the policy stops it.
 *   logits, likeliest  as above, of the head that each sequence stopped at
 *   blocks_run         [batch]; 0 for sequences without new tokens
 *   confidence         [policy->count, batch], NaN where the head wasn't asked; may be null */
OJFA_API ojfa_status ojfa_session_decide(ojfa_session session, const ojfa_tokens* tokens,
                                         const ojfa_policy* policy, float* logits, size_t capacity,
                                         int32_t* likeliest, int32_t* blocks_run, double* confidence);

/* Appends tokens and runs all that waits through all blocks; logits [sum of counts, V] of each sequence's
 * last counts[row] tokens, which are no more than the last block hasn't processed. */
OJFA_API ojfa_status ojfa_session_complete(ojfa_session session, const ojfa_tokens* tokens,
                                           const size_t* counts, float* logits, size_t capacity);

/* Runs tokens that stopped earlier through more blocks, without new ones; outputs as of advance. */
OJFA_API ojfa_status ojfa_session_deepen(ojfa_session session, int32_t exit, float* logits, size_t capacity,
                                         int32_t* likeliest);

/* Drops a sequence's tokens after the first `length`: a change of numbers, nothing is computed. */
OJFA_API ojfa_status ojfa_session_rewind(ojfa_session session, size_t row, size_t length);

/* Tokens of each sequence: [batch]. */
OJFA_API ojfa_status ojfa_session_lengths(ojfa_session session, int32_t* lengths);

/* A sequence's token ids so far: `count` receives how many, `ids` as many of them as there is room for. */
OJFA_API ojfa_status ojfa_session_tokens(ojfa_session session, size_t row, int32_t* ids, size_t capacity,
                                         size_t* count);

/* Tokens that each block has processed: [blocks, batch]. */
OJFA_API ojfa_status ojfa_session_watermarks(ojfa_session session, int32_t* marks);

/* ---- Statistics, events, shadow checks ---- */

typedef struct ojfa_stats {
    uint64_t exit_heads;           /* rows that the exit head was applied to */
    uint64_t final_heads;          /* rows that the model's own head was applied to */
    uint64_t checks;               /* those of exit_heads that a threshold was compared with */
    uint64_t drafted;              /* tokens that speculation proposed */
    uint64_t accepted;             /* those of them that the full model took */
    uint64_t rounds;               /* full passes that checked drafts */
    uint64_t shadow_checks;        /* early tokens that were compared with the full model */
    uint64_t shadow_disagreements; /* those of them that differ */
} ojfa_stats;

/* Counts since the session began, or since ojfa_session_reset_stats. By blocks run, each [blocks + 1], index
 * 0 unused, each may be null: `exits` steps of one sequence, `stopped` tokens that a policy stopped early and
 * `confidence_sums` their confidence. */
OJFA_API ojfa_status ojfa_session_stats(ojfa_session session, ojfa_stats* stats, uint64_t* exits,
                                        uint64_t* stopped, double* confidence_sums);
OJFA_API ojfa_status ojfa_session_reset_stats(ojfa_session session);

typedef enum ojfa_event_kind {
    OJFA_EVENT_EXIT = 0,  /* a token was computed: position, blocks_run */
    OJFA_EVENT_DRAFT = 1, /* a draft was checked: drafted, accepted */
    OJFA_EVENT_SHADOW = 2 /* a chosen token was compared: position, blocks_run, agrees */
} ojfa_event_kind;

typedef struct ojfa_event {
    ojfa_event_kind kind;
    int32_t row;        /* which sequence */
    int32_t position;   /* of the token that it follows, from 0 */
    int32_t blocks_run; /* blocks that computed it */
    int32_t drafted, accepted;
    int32_t agrees;
} ojfa_event;

/* Calls `listener` in the middle of each step, in the thread of the step; it must not use the session. Null
 * ends that. */
OJFA_API ojfa_status ojfa_session_listen(ojfa_session session,
                                         void (*listener)(void* user, const ojfa_event* event), void* user);

/* Completes chosen early tokens to full depth and compares them with the full model: when there is time. At
 * most `budget` comparisons, oldest first, all where it is negative; `done` receives how many there were. */
OJFA_API ojfa_status ojfa_session_run_shadow_checks(ojfa_session session, int64_t budget, size_t* done);

/* The share of a sequence's chosen tokens that differ, NaN where none was chosen. All must have been
 * compared. */
OJFA_API ojfa_status ojfa_session_shadow_loss(ojfa_session session, size_t row, double* loss);

/* ---- Generations ---- */

typedef struct ojfa_speculation {
    int32_t exit;      /* blocks that draft; 0: half of them */
    int32_t draft;     /* tokens per draft; 0: adapted to the acceptance */
    double draft_cost; /* of drafting a token, a full step being 1; negative: the share of blocks */
    double check_cost; /* what another token adds to the pass that checks [0.1] */
    double round_cost; /* what a pass that checks takes beside that [0] */
    double acceptance; /* believed before anything was drafted [0.7] */
} ojfa_speculation;

OJFA_API void ojfa_speculation_init(ojfa_speculation* speculation);

typedef struct ojfa_generate_options {
    size_t struct_size;                  /* set by ojfa_generate_options_init */
    int32_t exit;                        /* 1..blocks or OJFA_EXIT_… [OJFA_EXIT_DEFAULT] */
    const ojfa_policy* policy;           /* decides the exits, in place of `exit`; null: none */
    const ojfa_speculation* speculation; /* drafts and checks: the tokens of full depth; null: none */
    int32_t max_new_tokens;              /* of each sequence [64] */
    double temperature;                  /* 0: the likeliest token [0] */
    int32_t top_k;                       /* sample among so many; 0: all [0] */
    double top_p;                        /* sample within this much probability [1] */
    uint64_t seed;                       /* of sampling; each sequence has its own random numbers */
    const int32_t* stop_tokens;          /* end a text as the model's own end-of-text tokens do */
    size_t stop_token_count;
    int ignore_eos; /* whether the model's end-of-text tokens don't end a text */
} ojfa_generate_options;

OJFA_API void ojfa_generate_options_init(ojfa_generate_options* options);

/* Begins to generate after what the session's sequences hold and these tokens. Several generations may follow
 * each other in a session; the last token of each isn't in the session. Closed with ojfa_generation_close. */
OJFA_API ojfa_status ojfa_generation_start(ojfa_session session, const ojfa_tokens* prompts,
                                           const ojfa_generate_options* options, ojfa_generation* generation);

typedef enum ojfa_finish {
    OJFA_FINISH_NONE = 0,
    OJFA_FINISH_END_OF_TEXT = 1,
    OJFA_FINISH_MAX_NEW_TOKENS = 2,
    OJFA_FINISH_CACHE_FULL = 3
} ojfa_finish;

typedef struct ojfa_step {
    int32_t row;        /* which sequence */
    int32_t token;      /* its next token */
    int32_t blocks_run; /* blocks that computed it */
    int32_t drafted;    /* whether speculation proposed it before the full model took it */
    ojfa_finish finish; /* why it is the sequence's last, or OJFA_FINISH_NONE */
} ojfa_step;

/* The next token; `more` receives 0, and `step` nothing, where all sequences have ended. After
 * OJFA_ERROR_CANCELLED a further call goes on where it stopped. */
OJFA_API ojfa_status ojfa_generation_next(ojfa_generation generation, ojfa_step* step, int* more);
OJFA_API ojfa_status ojfa_generation_close(ojfa_generation generation);

#ifdef __cplusplus
}
#endif

#endif /* OJFA_OJFA_H */
