// torch's tensors, read and made without torch's headers: through its table of DLPack functions (torch 2.10 and later), or
// by four attributes. The structs are those of dlpack.h (DLPack 1.3), of which only this much is needed.
#pragma once
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdint>
#include <initializer_list>

#include "bind.h"

struct DLDevice {
    int32_t type, id;  // 1: CPU
};
struct DLDataType {
    uint8_t code, bits;  // 0: int, 2: float, 4: bfloat, 6: bool
    uint16_t lanes;
};
struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct DLManagedTensorVersioned {
    uint32_t major, minor;
    void* context;
    void (*deleter)(DLManagedTensorVersioned*);
    uint64_t flags;
    DLTensor tensor;
};
struct DLPackExchangeAPI {
    uint32_t major, minor;
    void* previous;
    int (*allocate)(DLTensor* like, DLManagedTensorVersioned** out, void* error,
                    void (*set_error)(void* error, const char* kind, const char* message));
    int (*from_object)(void* object, DLManagedTensorVersioned** out);
    int (*to_object)(DLManagedTensorVersioned* tensor, void** out);
    int (*read)(void* object, DLTensor* out);
    int (*stream)(int32_t device_type, int32_t device_id, void** out);
};

// The first four are those of form.h.
enum Type : int64_t { F32 = FLOAT32, F64 = FLOAT64, BF16 = BFLOAT16, F16 = FLOAT16, BOOL, INT64, INT32, TYPES };

struct View {
    char* data;
    int64_t type, ndim;
    int64_t shape[MOST + 1], stride[MOST + 1];  // moments side by side have an axis more than x

    int64_t numel() const {
        int64_t all = 1;
        for (int d = 0; d < ndim; ++d) all *= shape[d];
        return all;
    }
    bool contiguous() const {
        int64_t expected = 1;
        for (int64_t d = ndim - 1; d >= 0; --d) {
            if (shape[d] != 1 && stride[d] != expected) return false;
            expected *= shape[d];
        }
        return true;
    }
};

// What the module was told of torch.
struct Torch {
    const DLPackExchangeAPI* api = nullptr;
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    PyObject *empty = nullptr, *empty_like = nullptr, *num_threads = nullptr, *convert = nullptr, *copy = nullptr;
    PyObject *dtypes[TYPES] = {}, *cpu = nullptr;
    PyObject *is_neg = nullptr, *data_ptr = nullptr, *shape = nullptr, *stride = nullptr, *dtype = nullptr;
    PyObject *device = nullptr, *type = nullptr, *layout = nullptr, *strided = nullptr;
};
static Torch torch;

// Owns a reference.
class Ref {
   public:
    Ref(PyObject* object = nullptr) : object(object) {}
    Ref(const Ref&) = delete;
    Ref& operator=(PyObject* other) {
        Py_XDECREF(object);
        object = other;
        return *this;
    }
    ~Ref() { Py_XDECREF(object); }
    explicit operator bool() const { return object != nullptr; }
    PyObject* get() const { return object; }
    PyObject* or_none() const { return object ? object : Py_None; }
    PyObject* release() {
        PyObject* given = object;
        object = nullptr;
        return given;
    }

   private:
    PyObject* object;
};

inline bool is_plain(PyObject* o) { return Py_TYPE(o) == torch.tensor || Py_TYPE(o) == torch.parameter; }

inline bool is_negated(PyObject* o) {  // a lazy minus sign is not in memory
    Ref answer(PyObject_CallMethodObjArgs(o, torch.is_neg, nullptr));
    if (answer.get() == Py_False) return false;
    PyErr_Clear();
    return true;
}

// A tensor's four attributes.
inline bool read_attributes(PyObject* o, View& v) {
    Ref layout(PyObject_GetAttr(o, torch.layout)), device(PyObject_GetAttr(o, torch.device));
    if (layout.get() != torch.strided || !device) return false;
    Ref where(PyObject_GetAttr(device.get(), torch.type));
    if (!where || PyObject_RichCompareBool(where.get(), torch.cpu, Py_EQ) != 1) return false;
    Ref dtype(PyObject_GetAttr(o, torch.dtype)), shape(PyObject_GetAttr(o, torch.shape));
    Ref stride(PyObject_CallMethodObjArgs(o, torch.stride, nullptr));
    Ref place(PyObject_CallMethodObjArgs(o, torch.data_ptr, nullptr));
    if (!dtype || !shape || !stride || !place) return false;
    v.type = 0;
    while (v.type < TYPES && torch.dtypes[v.type] != dtype.get()) ++v.type;
    v.ndim = PyTuple_Size(shape.get());
    if (v.type == TYPES || v.ndim < 0 || v.ndim > MOST + 1) return false;
    for (int64_t d = 0; d < v.ndim; ++d) {
        v.shape[d] = PyLong_AsLongLong(PyTuple_GetItem(shape.get(), d));
        v.stride[d] = PyLong_AsLongLong(PyTuple_GetItem(stride.get(), d));
    }
    v.data = static_cast<char*>(PyLong_AsVoidPtr(place.get()));
    return !PyErr_Occurred();
}

// False: it is no plain, dense tensor on a CPU of a dtype that is known here. No exception is left.
inline bool read(PyObject* o, View& v) {
    if (!is_plain(o)) return false;
    if (!torch.api) {
        bool done = read_attributes(o, v);
        PyErr_Clear();
        return done;
    }
    DLTensor t;
    if (torch.api->read(o, &t) != 0) {
        PyErr_Clear();
        return false;
    }
    if (t.device.type != 1 || t.ndim > MOST + 1 || t.dtype.lanes != 1) return false;
    const int bits = t.dtype.bits;
    v.type = t.dtype.code == 2   ? (bits == 32 ? F32 : bits == 64 ? F64 : bits == 16 ? F16 : TYPES)
             : t.dtype.code == 4 ? (bits == 16 ? BF16 : TYPES)
             : t.dtype.code == 0 ? (bits == 64 ? INT64 : bits == 32 ? INT32 : TYPES)
             : t.dtype.code == 6 ? BOOL
                                 : TYPES;
    if (v.type == TYPES) return false;
    v.ndim = t.ndim;
    std::copy(t.shape, t.shape + t.ndim, v.shape), std::copy(t.strides, t.strides + t.ndim, v.stride);
    v.data = static_cast<char*>(t.data) + t.byte_offset;
    return true;
}

// A new contiguous tensor. Null, with an exception: there is no memory.
inline PyObject* fresh(const int64_t* shape, int ndim, int64_t type, char*& data) {
    if (!torch.api) {
        Ref sizes(PyTuple_New(ndim)), arguments(PyTuple_New(1)), options(PyDict_New());
        for (int d = 0; d < ndim; ++d) PyTuple_SetItem(sizes.get(), d, PyLong_FromLongLong(shape[d]));
        PyTuple_SetItem(arguments.get(), 0, sizes.release());
        PyDict_SetItemString(options.get(), "dtype", torch.dtypes[type]);
        PyDict_SetItemString(options.get(), "device", torch.cpu);
        Ref made(PyObject_Call(torch.empty, arguments.get(), options.get()));
        View v;
        if (!made || !read_attributes(made.get(), v)) return nullptr;
        data = v.data;
        return made.release();
    }
    static const DLDataType types[TYPES] = {{2, 32, 1}, {2, 64, 1}, {4, 16, 1}, {2, 16, 1}, {6, 8, 1}, {0, 64, 1}, {0, 32, 1}};
    DLTensor like{};
    like.device = {1, 0}, like.ndim = ndim, like.dtype = types[type], like.shape = const_cast<int64_t*>(shape);
    DLManagedTensorVersioned* made = nullptr;
    auto fail = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_MemoryError, message); };
    void* object = nullptr;
    bool done = torch.api->allocate(&like, &made, nullptr, fail) == 0;
    if (done) {
        data = static_cast<char*>(made->tensor.data) + made->tensor.byte_offset;
        done = torch.api->to_object(made, &object) == 0;
    }
    if (!done && !PyErr_Occurred()) PyErr_NoMemory();
    return done ? static_cast<PyObject*>(object) : nullptr;
}

inline PyObject* fresh(std::initializer_list<int64_t> shape, int64_t type, char*& data) {
    return fresh(shape.begin(), int(shape.size()), type, data);
}
