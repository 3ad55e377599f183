/* What Python hands over: the fields and their order are those of runtime/native.py and runtime/native_decoder.py. */

enum { LAYOUT = 4 }; /* raise it here and in runtime/kernel_library.py with every change of this file or of what kernels.c takes */
enum {
    PANEL = 16,  /* rows of a matrix that lie side by side */
    BLOCK = 32,  /* columns of it that lie together */
};

typedef struct {
    const uint8_t *codes;   /* [panels of 16 rows][blocks of 32 columns][...]: see runtime/native.py, pack_codes */
    const uint16_t *scales; /* float16 [panels][groups][16 rows] */
    const float *bias;      /* [padded rows], or NULL */
    int64_t rows;           /* padded to whole panels */
    int64_t columns;        /* a multiple of 32 */
    int64_t group_size;     /* columns that share a scale: a multiple of 32 that divides columns */
    int64_t bits;           /* 4 or 8 */
    float factor;           /* of all results, before the bias: a power of two, where halves alone do not reach down to the scales */
} Matrix;

typedef struct {
    Matrix query, key, value, output, gate, up, down;
    const float *input_norm, *post_norm;  /* [hidden_size] */
    const float *query_norm, *key_norm;   /* [head_dim], or NULL */
} Layer;

typedef struct {
    const Layer *layers;
    int64_t layer_count, hidden_size, heads, key_value_heads, head_dim, intermediate_size;
    float norm_eps;
    const float *norm; /* [hidden_size]: before the head */
    Matrix head;
} Stack;

typedef struct {
    void *keys;   /* [layers][batch][key_value_heads][capacity / lanes][head_dim][lanes], float or int8 */
    void *values; /* [layers][batch][key_value_heads][capacity][head_dim], the same */
    float *key_scales, *value_scales; /* [layers][batch][key_value_heads][capacity] of int8; NULL: float */
    int64_t batch, capacity;
} Cache;

typedef struct {
    float *hidden;        /* [batch * length][hidden_size]; transformed in place */
    float *logits;        /* [batch * length][rows of the head], or NULL: not wanted */
    const float *cosines; /* [batch * length][head_dim], as are the sines */
    const float *sines;
    const int64_t *starts; /* [batch]: positions before these are padding */
    int64_t length, past;  /* new positions, and those in the cache */
} Step;

/* Inputs of a matrix, BLOCK of them with one scale: bytes, or 255 * coarse + fine. */
typedef struct {
    int8_t *codes;   /* [groups of rows][blocks][rows of the group][32, or 32 fine, 32 coarse]: see matmul.h, group_of */
    float *scales;   /* [groups of rows][blocks][rows of the group] */
    int32_t *starts; /* the same: where sums of products begin, which is minus the code of a zero times the sum of the inputs */
} Inputs;

/* Narrow ones for codes of 4 bits, wide ones for codes of 8, as far as matrices that share inputs want them. */
typedef struct {
    Inputs narrow, wide;
    int wants_narrow, wants_wide;
} Forms;
