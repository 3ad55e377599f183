/* What Python hands over: the fields and their order are those of runtime/native.py. */

typedef struct {
    const uint8_t *codes;   /* [panels of 16 rows][blocks of 32 columns][...]: see runtime/native.py, pack_codes */
    const uint16_t *scales; /* float16 [panels][groups][16 rows] */
    const float *bias;      /* [padded rows], or NULL */
    int64_t rows;           /* padded to whole panels */
    int64_t columns;        /* a multiple of 32 */
    int64_t group_size;     /* columns that share a scale: a multiple of 32 that divides columns */
    int64_t bits;           /* 4 or 8 */
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
} Stack;

typedef struct {
    float *keys;   /* [layers][batch][key_value_heads][capacity / lanes][head_dim][lanes] */
    float *values; /* [layers][batch][key_value_heads][capacity][head_dim] */
    int64_t batch, capacity;
} Cache;

typedef struct {
    float *hidden;        /* [batch * length][hidden_size]; transformed in place */
    const float *cosines; /* [batch * length][head_dim], as are the sines */
    const float *sines;
    const int64_t *starts; /* [batch]: positions before these are padding */
    int64_t length, past;  /* new positions, and those in the cache */
} Step;

/* Inputs of a matrix in bytes: one scale per 32 of them. */
typedef struct {
    int8_t *codes;  /* [rows][columns] */
    float *scales;  /* [rows][columns / 32] */
    int32_t *sums;  /* [rows][columns / 32], of the codes */
} Inputs;
