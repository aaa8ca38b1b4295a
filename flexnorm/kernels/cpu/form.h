// What the binder tells the kernels: the form (see flexnorm/canonical.py), and the tensors of one call.
#pragma once
#include <cstdint>

constexpr int DIMS = 12;
constexpr int64_t GRAIN = 1 << 15;  // elements that pay for waking a thread (5 us)

// What decides the order of a sum, so that the binder and the kernels must agree in it. The oracle of tests has it too (tests/cutter.py).
constexpr int64_t CHUNK = 1 << 16;  // elements of a set that are summed before they are merged with the next
constexpr int64_t SPLIT = 256;      // a run of columns so long is summed by itself, whatever the rows
constexpr int64_t SHORT = 8;        // shorter ones are not, however few rows share their columns
constexpr int64_t LONG = 16;        // columns of a run that pay for looking for its end

enum Step { X, Y, SET, MASK, PARAM, SET_BLOCK, PARAM_BLOCK, PARAM_LABEL, STEPS };
enum Dtype : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum Kind : int64_t { ONE, EACH, TABLE };
enum MaskKind : int64_t { EVERYTHING, MEMBERSHIP, WEIGHTS };
enum Activation : int64_t { IDENTITY, RELU, SILU, GELU };
enum What : int64_t { FORWARD, STATISTICS, APPLY, BACKWARD, BACKWARD_SUMS, BACKWARD_DX };

struct Dim {
    int64_t size;
    int64_t step[STEPS];
};

struct Column {
    int64_t kind;
    const int32_t* table;    // [blocks, columns]
    int64_t count;           // sets that the columns of a range meet
    const int64_t* offsets;  // [count], or null: 0, 1, 2, ...
    const int32_t* runs;     // first column of every run of one value, block after block
    const int64_t* run_ptr;  // [blocks + 1]: the runs of every block
    int64_t mean_run;        // columns of a run
    int64_t blocks;          // of the table
    int64_t even;            // eight divides the columns of every run
    int64_t shortest, longest;  // columns of a run, of all blocks
};

struct Form {
    int64_t dtype, columns, numel;
    int64_t n_outer, n_inner, n_segment;  // n_segment: axes that labels consume, 0 if none
    int64_t outer_at, inner_at;           // place of the segments among outer and inner
    Dim outer[DIMS], inner[DIMS], segment[DIMS];
    const int64_t* offsets;       // [groups + 1]
    const int64_t* order;         // [elements], or null
    const int64_t* segment_sets;  // [groups], or null: one step
    int64_t segment_step, groups;
    Column sets, mask, params;
    const int64_t* param_label;  // or null
    int64_t n_sets, n_params, n_mask, injective;
    int64_t mask_kind, center, scale, activation;
    double eps;
    double count;  // of every set, 0 if they differ
    // What decides how a set is summed: it depends on no size that is not the set's own (bind.h). So does the kind
    // of the mask, also where none is given.
    int64_t few;     // few rows share the sums of a column
    int64_t apart;   // members of a set lie side by side along the columns or not, as ids are sorted: there are no runs
    int64_t shared;  // all rows of a range have the same parameters
    int64_t by_runs; // parameters are one along runs of SHORT columns or more
    int64_t chunk;   // rows of a chunk; 0 where one set has all elements of a range, of which a chunk has CHUNK
};

struct Call {
    int64_t what, threads;
    int64_t past;       // the result is so large that it is written past the caches (pages.h)
    const void* x;
    const void* dy;     // null: zeros
    void* y;            // or dx
    const void* mask;   // uint8, or T
    const void* weight; // T
    const void* bias;   // T
    void* mean;         // T [n_sets], read or written; null: nobody asks for the moments
    void* low;
    void* m2;
    void* count;        // int64 or T (count_wide), null where form.count says it
    int64_t count_wide;
    void* dmask;        // T
    void* dweight;      // T
    void* dbias;        // T
    void* sum_g;        // T [n_sets], written by the sums, read by dx; null in dx: the moments do not depend on x
    void* sum_gx;
};
