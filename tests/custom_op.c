/* A library of one custom operator, test.onnxq:Twice: y = 2 x, float32 of any shape.
 *
 * onnxruntime's wheel has no C header. Its API is a table of functions that only ever grows, so the
 * few that are needed are taken by their place in it.
 */
#include <stddef.h>
#include <stdint.h>

enum { /* places in OrtApi */
    CREATE_CUSTOM_OP_DOMAIN = 26, CUSTOM_OP_DOMAIN_ADD = 27, ADD_CUSTOM_OP_DOMAIN = 28,
    GET_TENSOR_MUTABLE_DATA = 51, GET_DIMENSIONS_COUNT = 61, GET_DIMENSIONS = 62,
    GET_TENSOR_SHAPE_ELEMENT_COUNT = 64, GET_TENSOR_TYPE_AND_SHAPE = 65,
    KERNEL_CONTEXT_GET_INPUT = 90, KERNEL_CONTEXT_GET_OUTPUT = 91,
    RELEASE_TENSOR_TYPE_AND_SHAPE_INFO = 99,
};
enum { FLOAT = 1, REQUIRED = 0, MOST_DIMENSIONS = 16, API_VERSION = 16 };

typedef void *(*Function)();
typedef struct { const Function *(*GetApi)(uint32_t version); } Base;

typedef struct Op {
    uint32_t version;
    void *(*CreateKernel)(const struct Op *, const Function *, const void *);
    const char *(*GetName)(const struct Op *);
    const char *(*GetExecutionProviderType)(const struct Op *);
    int (*GetInputType)(const struct Op *, size_t);
    size_t (*GetInputTypeCount)(const struct Op *);
    int (*GetOutputType)(const struct Op *, size_t);
    size_t (*GetOutputTypeCount)(const struct Op *);
    void (*KernelCompute)(void *, void *);
    void (*KernelDestroy)(void *);
    int (*GetInputCharacteristic)(const struct Op *, size_t);
    int (*GetOutputCharacteristic)(const struct Op *, size_t);
    int (*GetInputMemoryType)(const struct Op *, size_t);
    int (*counts[4])(const struct Op *); /* of variadic inputs and outputs, which Twice has not */
    void *newer[8];                      /* of later versions of the API */
} Op;

static const Function *api;

static void *create(const Op *op, const Function *given, const void *info) {
    (void)op; (void)info;
    return (void *)given;
}
static const char *name(const Op *op) { (void)op; return "Twice"; }
static const char *provider(const Op *op) { (void)op; return NULL; }
static int type(const Op *op, size_t index) { (void)op; (void)index; return FLOAT; }
static size_t one(const Op *op) { (void)op; return 1; }
static int characteristic(const Op *op, size_t index) { (void)op; (void)index; return REQUIRED; }
static void destroy(void *kernel) { (void)kernel; }

static void compute(void *kernel, void *context) {
    const void *input;
    void *shape, *output;
    int64_t dimensions[MOST_DIMENSIONS];
    size_t rank, count;
    float *x, *y;
    (void)kernel;
    ((void *(*)(void *, size_t, const void **))api[KERNEL_CONTEXT_GET_INPUT])(context, 0, &input);
    ((void *(*)(const void *, void **))api[GET_TENSOR_TYPE_AND_SHAPE])(input, &shape);
    ((void *(*)(void *, size_t *))api[GET_DIMENSIONS_COUNT])(shape, &rank);
    ((void *(*)(void *, int64_t *, size_t))api[GET_DIMENSIONS])(shape, dimensions, rank);
    ((void *(*)(void *, size_t *))api[GET_TENSOR_SHAPE_ELEMENT_COUNT])(shape, &count);
    ((void (*)(void *))api[RELEASE_TENSOR_TYPE_AND_SHAPE_INFO])(shape);
    ((void *(*)(void *, size_t, const int64_t *, size_t, void **))api[KERNEL_CONTEXT_GET_OUTPUT])(
        context, 0, dimensions, rank, &output);
    ((void *(*)(const void *, float **))api[GET_TENSOR_MUTABLE_DATA])(input, &x);
    ((void *(*)(void *, float **))api[GET_TENSOR_MUTABLE_DATA])(output, &y);
    for (size_t i = 0; i < count; i++) y[i] = 2 * x[i];
}

static const Op twice = {
    API_VERSION, create, name, provider, type, one, type, one, compute, destroy,
    characteristic, characteristic, characteristic, {0}, {0},
};

void *RegisterCustomOps(void *options, const Base *base) {
    void *domain, *status;
    api = base->GetApi(API_VERSION);
    status = ((void *(*)(const char *, void **))api[CREATE_CUSTOM_OP_DOMAIN])("test.onnxq", &domain);
    if (!status) status = ((void *(*)(void *, const Op *))api[CUSTOM_OP_DOMAIN_ADD])(domain, &twice);
    if (!status) status = ((void *(*)(void *, void *))api[ADD_CUSTOM_OP_DOMAIN])(options, domain);
    return status;
}
