// The module that Python calls. Each function reads its tensors, binds the pattern to them, and runs one kernel.
//
// An answer of None means that Python has to look closer: it repeats the checks and raises the error in words, or takes
// another backend. No function of this file raises because of a shape, a dtype or a value.
#include <cmath>
#include <exception>
#include <limits>

#include "entry.h"
#include "mix.h"
#include "pages.h"
#include "tensors.h"

namespace {

Pages pages = ASK;                  // what is known of large results

const Pattern* pattern_of(PyObject* o) { return reinterpret_cast<const Pattern*>(PyBytes_AsString(o)); }

// --- the pattern -----------------------------------------------------------------------------------------------------

// The numbers of a tuple. False: there are too many.
template <class I>
bool numbers(PyObject* tuple, I* to, int32_t& n) {
    Py_ssize_t size = PyTuple_Size(tuple);
    if (size < 0 || size > MOST) return false;
    n = int32_t(size);
    for (Py_ssize_t i = 0; i < size; ++i) to[i] = I(PyLong_AsLongLong(PyTuple_GetItem(tuple, i)));
    return true;
}

// pattern(dims, dim of each axis, its told size or -1, axes of each label, sets, mask or None, params or None, center,
// scale, activation, whether labels merge axes, eps): the pattern as bytes, or None where it is too large. An operand is a
// tuple of elements, an element one of terms: an axis, or ~label.
PyObject* pattern(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 12) return PyErr_Format(PyExc_TypeError, "pattern takes 12 arguments");
    Pattern p;
    std::memset(&p, 0, sizeof p);
    int32_t rank;
    p.dims = int32_t(PyLong_AsLongLong(a[0]));
    if (p.dims > MOST || !numbers(a[1], p.dim_of, p.rank) || !numbers(a[2], p.told, rank)) Py_RETURN_NONE;
    if (rank != p.rank || PyTuple_Size(a[3]) > MOST) Py_RETURN_NONE;
    p.labels = int32_t(PyTuple_Size(a[3]));
    for (int l = 0; l < p.labels; ++l)
        if (!numbers(PyTuple_GetItem(a[3], l), p.label_axes[l], p.label_rank[l])) Py_RETURN_NONE;
    for (int o = 0; o < OPERANDS; ++o) {
        PyObject* elements = a[4 + o];
        if (elements == Py_None) continue;
        p.present[o] = 1;
        Terms& terms = p.operand[o];
        if (PyTuple_Size(elements) > MOST) Py_RETURN_NONE;
        terms.elements = int32_t(PyTuple_Size(elements));
        for (int e = 0; e < terms.elements; ++e) {
            int32_t term[MOST];
            if (!numbers(PyTuple_GetItem(elements, e), term, terms.length[e]) || terms.n + terms.length[e] > MOST) Py_RETURN_NONE;
            std::copy(term, term + terms.length[e], terms.term + terms.n);
            terms.n += terms.length[e];
        }
    }
    p.center = PyObject_IsTrue(a[7]), p.scale = PyObject_IsTrue(a[8]), p.activation = PyLong_AsLongLong(a[9]);
    p.labels_merge = PyObject_IsTrue(a[10]), p.eps = PyFloat_AsDouble(a[11]);
    if (PyErr_Occurred()) {  // a number that no size can be
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&p), sizeof p);
}

// --- what all entries share ------------------------------------------------------------------------------------------

enum Ready { NO, YES, RAISED };

struct Prepared {
    const Pattern* p;
    Numbers v;
    Tables tables;
    Form f;
    Call c{};
    Ref x, mask, weight, bias;  // as the kernel reads them: the user's own, or converted
    bool weighs = false;        // the mask is floating
    int64_t wide, bytes;        // the type of statistics, and its size
    Ref y;
    char* at_y = nullptr;
    int64_t sets_shape[MOST];
    int sets_dims = 0;
};

// A tensor that a kernel reads: contiguous, of the type. Itself, or converted.
Ready take(PyObject* o, int64_t type, View& v, Ref& kept) {
    if (!read(o, v) || is_negated(o)) return NO;
    if (v.type == type && v.contiguous()) {
        Py_INCREF(o);
        kept = o;
        return YES;
    }
    if ((v.type >= BOOL) != (type >= BOOL) || (type == BOOL && v.type != BOOL)) return NO;
    kept = PyObject_CallFunctionObjArgs(torch.convert, o, torch.dtypes[type], nullptr);
    if (!kept) return RAISED;
    return read(kept.get(), v) ? YES : NO;
}

PyObject* like(PyObject* o, char*& data) {
    Ref made(PyObject_CallFunctionObjArgs(torch.empty_like, o, nullptr));
    View v;
    if (!made) return nullptr;
    if (!read(made.get(), v)) return PyErr_Format(PyExc_RuntimeError, "torch.empty_like returned what flexnorm cannot read");
    data = v.data;
    return made.release();
}

bool weights_are_good(const View& v) {
    const int64_t n = v.numel();
    bool good = true;
    auto all = [&](auto* w) {
        using T = std::decay_t<decltype(*w)>;
        for (int64_t i = 0; i < n; ++i) good = good & (w[i] >= 0) & (w[i] <= std::numeric_limits<T>::max());
    };
    if (v.type == F64) all(reinterpret_cast<const double*>(v.data));
    else all(reinterpret_cast<const float*>(v.data));
    return good;
}

// The labels of a pattern: a tuple of (ids, count, offsets, order or None).
bool labels_of(const Pattern& p, PyObject* labels, Numbers& v) {
    View t;
    if (PyTuple_Size(labels) != p.labels) return false;
    for (int l = 0; l < p.labels; ++l) {
        PyObject* label = PyTuple_GetItem(labels, l);
        if (!read(PyTuple_GetItem(label, 0), t) || t.type != INT64 || t.ndim != p.label_rank[l]) return false;
        v.label[l].ids = reinterpret_cast<int64_t*>(t.data);
        std::copy(t.shape, t.shape + t.ndim, v.label_size[l]);
        v.label[l].count = PyLong_AsLongLong(PyTuple_GetItem(label, 1));
        if (!read(PyTuple_GetItem(label, 2), t)) return false;
        v.label[l].offsets = reinterpret_cast<int64_t*>(t.data), v.label[l].order = nullptr;
        if (PyObject* order = PyTuple_GetItem(label, 3); order != Py_None) {
            if (!read(order, t)) return false;
            v.label[l].order = reinterpret_cast<int64_t*>(t.data);
        }
    }
    return true;
}

// a: pattern, x, mask, weight, bias, labels: a tuple of (ids, count, offsets, order or None). With `result`, y is made.
Ready prepare(PyObject* const* a, Prepared& q, bool result, bool params = true) {
    View x, y, t;
    q.p = pattern_of(a[0]);
    const Pattern& p = *q.p;
    if (!read(a[1], x) || x.type > F16 || x.ndim != p.dims || is_negated(a[1])) return NO;
    Numbers& v = q.v;
    Call& c = q.c;
    v.dtype = x.type, v.mask_kind = EVERYTHING, v.mask_dims = v.param_dims = -1;
    q.wide = x.type == F64 ? F64 : F32, q.bytes = x.type == F64 ? 8 : 4;
    for (int d = 0; d < x.ndim; ++d) {
        if (x.shape[d] == 0) return NO;
        v.size[d] = x.shape[d], v.x[d] = v.y[d] = x.stride[d];
    }
    if (result || !x.contiguous()) {  // without a result its strides still say in which order x is walked
        if (!(q.y = like(a[1], q.at_y))) return RAISED;
        read(q.y.get(), y);
        std::copy(y.stride, y.stride + y.ndim, v.y);
    }
    if (a[2] != Py_None) {
        if (!p.present[OF_MASK] || !read(a[2], t) || t.type > BOOL) return NO;
        q.weighs = t.type != BOOL;
        if (Ready done = take(a[2], q.weighs ? q.wide : int64_t(BOOL), t, q.mask); done != YES) return done;
        if (t.ndim > MOST) return NO;
        if (q.weighs && !weights_are_good(t)) return NO;
        v.mask_kind = q.weighs ? WEIGHTS : MEMBERSHIP, v.mask_dims = t.ndim, c.mask = t.data;
        std::copy(t.shape, t.shape + t.ndim, v.mask_size);
    }
    for (int i = 3; i < 5; ++i) {
        if (a[i] == Py_None) continue;
        if (!p.present[OF_PARAMS]) return NO;
        if (Ready done = take(a[i], q.wide, t, i == 3 ? q.weight : q.bias); done != YES) return done;
        if (t.ndim > MOST) return NO;
        if (v.param_dims >= 0 && (t.ndim != v.param_dims || !std::equal(t.shape, t.shape + t.ndim, v.param_size))) return NO;
        v.param_dims = t.ndim;
        std::copy(t.shape, t.shape + t.ndim, v.param_size);
        (i == 3 ? c.weight : c.bias) = t.data;
    }
    if (params && p.present[OF_PARAMS] && v.param_dims < 0) return NO;
    if (!labels_of(p, a[5], v)) return NO;
    Binder b(p, v, q.tables);
    if (!b.sizes() || !b.form(q.f, a[2] != Py_None)) return NO;
    q.sets_dims = b.shape(OF_SETS, q.sets_shape);
    c.x = x.data, c.y = result ? q.at_y : nullptr;
    if (result) c.past = writes_past(q.at_y, q.f.numel * (x.type == F64 ? 8 : x.type == F32 ? 4 : 2), pages);
    if (b.copied) {
        q.x = PyObject_CallFunctionObjArgs(torch.copy, a[1], nullptr);
        if (!q.x) return RAISED;
        if (!read(q.x.get(), x)) return NO;
        c.x = x.data;
    }
    c.threads = 1;
    if (q.f.numel >= GRAIN) {
        Ref threads(PyObject_CallFunctionObjArgs(torch.num_threads, nullptr));
        if (!threads) return RAISED;
        c.threads = PyLong_AsLongLong(threads.get());
    }
    return YES;
}

// Tables of labels may need more memory than there is; no exception of C++ may reach Python.
template <class F>
Ready safely(F f) {
    try {
        return f();
    } catch (const std::exception&) {
        PyErr_SetString(PyExc_MemoryError, "flexnorm: no memory for the tables of labels");
        return RAISED;
    }
}

#define PREPARE(...)                            \
    Prepared q;                                 \
    switch (safely([&] { return prepare(a, q, __VA_ARGS__); })) { \
        case NO: PyErr_Clear(); Py_RETURN_NONE; \
        case RAISED: return nullptr;            \
        case YES: break;                        \
    }

bool work(Prepared& q, What what) {
    q.c.what = what;
    int failed;
    Py_BEGIN_ALLOW_THREADS failed = run(q.f, q.c);
    Py_END_ALLOW_THREADS if (failed) PyErr_SetString(PyExc_MemoryError, "flexnorm: no memory for the sums of a kernel");
    return !failed;
}

// Memory of a number for every set, in the shape that the pattern writes. Of labels no value may be left out.
PyObject* over_sets(Prepared& q, int64_t type, char*& data) {
    PyObject* made = fresh(q.sets_shape, q.sets_dims, type, data);
    if (made && q.p->labels_merge) std::memset(data, 0, size_t(q.f.n_sets) * (type == F32 ? 4 : 8));
    return made;
}

// Memory for the count, where sets differ in it.
bool count_to_write(Prepared& q, Ref& count) {
    if (q.f.count != 0) return true;
    char* data;
    if (!(count = over_sets(q, q.weighs ? q.wide : int64_t(INT64), data))) return false;
    q.c.count = data, q.c.count_wide = q.weighs;
    return true;
}

// Mean, low and M2 side by side: [3, *sets].
bool moments_to_write(Prepared& q, Ref& moments) {
    char* data;
    int64_t shape[MOST + 1] = {3};
    std::copy(q.sets_shape, q.sets_shape + q.sets_dims, shape + 1);
    if (!(moments = fresh(shape, q.sets_dims + 1, q.wide, data))) return false;
    const int64_t one = q.f.n_sets * q.bytes;
    if (q.p->labels_merge) std::memset(data, 0, size_t(3 * one));
    q.c.mean = data, q.c.low = data + one, q.c.m2 = data + 2 * one;
    return true;
}

void packed_moments(Prepared& q, const View& v) {
    const int64_t one = q.f.n_sets * q.bytes;
    q.c.mean = v.data, q.c.low = v.data + one, q.c.m2 = v.data + 2 * one;
}

struct Given {  // moments that came from elsewhere, as a kernel reads them
    Ref count, mean, m2, low;
    std::vector<char> zeros, about_zero;
};

template <class T>
void turn_about_zero(Prepared& q, const void* m2, void* to) {
    const T *mean = static_cast<const T*>(q.c.mean), *old = static_cast<const T*>(m2);
    const T* wide = static_cast<const T*>(q.c.count);
    const int64_t* whole = static_cast<const int64_t*>(q.c.count);
    for (int64_t i = 0; i < q.f.n_sets; ++i)
        static_cast<T*>(to)[i] = old[i] + (q.c.count_wide ? wide[i] : T(whole[i])) * (mean[i] * mean[i]);
}

// a: count, mean, m2, low or None, of the shape that the pattern writes. Without centering M2 is turned to that about zero.
Ready given(Prepared& q, PyObject* const* a, Given& g) {
    View v;
    Ref* kept[4] = {&g.count, &g.mean, &g.m2, &g.low};
    char* at[4] = {};
    for (int i = 0; i < 4; ++i) {
        if (a[i] == Py_None) continue;
        if (!read(a[i], v)) return NO;
        bool whole = i == 0 && v.type >= INT64;
        if (Ready done = take(a[i], whole ? int64_t(INT64) : q.wide, v, *kept[i]); done != YES) return done;
        if (v.ndim != q.sets_dims || !std::equal(v.shape, v.shape + v.ndim, q.sets_shape)) return NO;
        if (i == 0) q.c.count_wide = !whole;
        at[i] = v.data;
    }
    if (!at[0] || !at[1] || !at[2]) return NO;
    if (!at[3]) {
        g.zeros.assign(size_t(q.f.n_sets * q.bytes), 0);
        at[3] = g.zeros.data();
    }
    q.c.count = at[0], q.c.mean = at[1], q.c.m2 = at[2], q.c.low = at[3];
    if (!q.p->center) {
        g.about_zero.resize(size_t(q.f.n_sets * q.bytes));
        if (q.wide == F64) turn_about_zero<double>(q, at[2], g.about_zero.data());
        else turn_about_zero<float>(q, at[2], g.about_zero.data());
        q.c.m2 = g.about_zero.data();
    }
    return YES;
}

#define GIVEN(first)                            \
    Given g;                                    \
    switch (safely([&] { return given(q, a + (first), g); })) { \
        case NO: PyErr_Clear(); Py_RETURN_NONE; \
        case RAISED: return nullptr;            \
        case YES: break;                        \
    }

// dy with the strides of y.
Ready take_dy(Prepared& q, PyObject* x, PyObject* dy, Ref& kept) {
    View v;
    if (dy == Py_None) return YES;
    if (!read(dy, v) || is_negated(dy)) return NO;
    bool same = v.type == q.v.dtype && v.ndim == q.p->dims;
    for (int d = 0; same && d < v.ndim; ++d)
        same = v.shape[d] == q.v.size[d] && (v.shape[d] == 1 || v.stride[d] == q.v.y[d]);
    if (!same) {
        kept = PyObject_CallFunctionObjArgs(torch.copy, x, dy, nullptr);
        if (!kept) return RAISED;
        if (!read(kept.get(), v)) return NO;
    }
    q.c.dy = v.data;
    return YES;
}

#define TAKE_DY(dy)                             \
    Ref own_dy;                                 \
    switch (take_dy(q, a[1], dy, own_dy)) {     \
        case NO: PyErr_Clear(); Py_RETURN_NONE; \
        case RAISED: return nullptr;            \
        case YES: break;                        \
    }

struct Gradients {  // of the mask, weight and bias, as the kernel writes them
    Ref mask, weight, bias;

    bool make(Prepared& q, bool of_mask, bool of_params) {
        char* data;
        if (of_mask && q.weighs) {
            if (!(mask = like(q.mask.get(), data))) return false;
            q.c.dmask = data;
        }
        if (of_params && q.weight) {
            if (!(weight = like(q.weight.get(), data))) return false;
            q.c.dweight = data;
        }
        if (of_params && q.bias) {
            if (!(bias = like(q.bias.get(), data))) return false;
            q.c.dbias = data;
        }
        return true;
    }

    // In the dtype of the operand.
    static bool as(Ref& gradient, const Ref& read, PyObject* operand) {
        if (!gradient || read.get() == operand) return true;
        Ref dtype(PyObject_GetAttr(operand, torch.dtype));
        if (!dtype) return false;
        gradient = PyObject_CallFunctionObjArgs(torch.convert, gradient.get(), dtype.get(), nullptr);
        return bool(gradient);
    }
    bool settle(Prepared& q, PyObject* const* a) {
        return as(mask, q.mask, a[2]) && as(weight, q.weight, a[3]) && as(bias, q.bias, a[4]);
    }
};

// --- entries. The first six arguments are those of `prepare`. --------------------------------------------------------

#define ENTRY(name, n_arguments)                                                                     \
    PyObject* name(PyObject*, PyObject* const* a, Py_ssize_t n) {                                    \
        if (n != (n_arguments)) return PyErr_Format(PyExc_TypeError, #name " takes %d arguments", n_arguments);

// y
ENTRY(evaluate, 6)
    PREPARE(true)
    return work(q, FORWARD) ? q.y.release() : nullptr;
}

// y, moments [3, *sets], count or None where all sets have the same
ENTRY(forward, 6)
    PREPARE(true)
    Ref moments, count;
    if (!moments_to_write(q, moments) || !count_to_write(q, count) || !work(q, FORWARD)) return nullptr;
    return PyTuple_Pack(3, q.y.get(), moments.get(), count.or_none());
}

// count, mean, m2, low in the shape of the sets
ENTRY(statistics, 6)
    PREPARE(false, false)
    char *at_count = nullptr, *mean, *m2, *low;
    Ref count, of_mean(over_sets(q, q.wide, mean)), of_m2(over_sets(q, q.wide, m2)), of_low(over_sets(q, q.wide, low));
    if (!of_mean || !of_m2 || !of_low || !count_to_write(q, count)) return nullptr;
    if (!count) {
        if (!(count = over_sets(q, INT64, at_count))) return nullptr;
        std::fill_n(reinterpret_cast<int64_t*>(at_count), q.f.n_sets, int64_t(q.f.count));
    }
    q.c.mean = mean, q.c.m2 = m2, q.c.low = low;
    if (!work(q, STATISTICS)) return nullptr;
    return PyTuple_Pack(4, count.get(), of_mean.get(), of_m2.get(), of_low.get());
}

// ..., count, mean, m2, low: y
ENTRY(apply, 10)
    PREPARE(true)
    GIVEN(6)
    return work(q, APPLY) ? q.y.release() : nullptr;
}

// ..., dy, moments [3, *sets], count or None, whether the gradient of a mask is wanted: those of x, mask, weight, bias
ENTRY(backward, 10)
    PREPARE(true)
    TAKE_DY(a[6])
    View v;
    Gradients gradients;
    if (!read(a[7], v) || v.type != q.wide || v.numel() != 3 * q.f.n_sets || !v.contiguous()) Py_RETURN_NONE;
    packed_moments(q, v);
    if (a[8] == Py_None && q.f.count == 0) Py_RETURN_NONE;
    if (a[8] != Py_None) {
        if (!read(a[8], v) || v.numel() != q.f.n_sets || !v.contiguous()) Py_RETURN_NONE;
        if (v.type != INT64 && v.type != q.wide) Py_RETURN_NONE;
        q.c.count = v.data, q.c.count_wide = v.type != INT64;
    }
    if (!gradients.make(q, PyObject_IsTrue(a[9]), true) || !work(q, BACKWARD) || !gradients.settle(q, a)) return nullptr;
    return PyTuple_Pack(4, q.y.get(), gradients.mask.or_none(), gradients.weight.or_none(), gradients.bias.or_none());
}

// ..., count, mean, m2, low, dy: the sums of g and g * xhat in the shape of the sets, the gradients of weight and bias
ENTRY(backward_sums, 11)
    PREPARE(false)
    GIVEN(6)
    TAKE_DY(a[10])
    char *sum_g, *sum_gx;
    Ref of_g(over_sets(q, q.wide, sum_g)), of_gx(over_sets(q, q.wide, sum_gx));
    Gradients gradients;
    if (!of_g || !of_gx || !gradients.make(q, false, true)) return nullptr;
    q.c.sum_g = sum_g, q.c.sum_gx = sum_gx;
    if (!work(q, BACKWARD_SUMS) || !gradients.settle(q, a)) return nullptr;
    return PyTuple_Pack(4, of_g.get(), of_gx.get(), gradients.weight.or_none(), gradients.bias.or_none());
}

// ..., count, mean, m2, low, dy or None, sums of g and of g * xhat or None: the gradients of x and of a floating mask.
// Without sums the moments do not depend on x.
ENTRY(backward_dx, 13)
    PREPARE(true)
    GIVEN(6)
    TAKE_DY(a[10])
    Ref sums[2];
    Gradients gradients;
    if ((a[11] == Py_None) != (a[12] == Py_None)) Py_RETURN_NONE;
    for (int i = 0; i < 2; ++i) {
        if (a[11 + i] == Py_None) continue;
        View v;
        Ready done = take(a[11 + i], q.wide, v, sums[i]);
        if (done == RAISED) return nullptr;
        if (done == NO || v.numel() != q.f.n_sets) {
            PyErr_Clear();
            Py_RETURN_NONE;
        }
        (i == 0 ? q.c.sum_g : q.c.sum_gx) = v.data;
    }
    if (!gradients.make(q, bool(sums[0]), false) || !work(q, BACKWARD_DX) || !gradients.settle(q, a)) return nullptr;
    return PyTuple_Pack(2, q.y.get(), gradients.mask.or_none());
}

// --- labels ----------------------------------------------------------------------------------------------------------

// groups(ids, number of groups or None): a copy of the ids, their number, where each group begins, and the order of the
// elements where the ids fall somewhere. None: an id is out of range, or this is no plain tensor of integers.
PyObject* groups(PyObject*, PyObject* const* a, Py_ssize_t n_arguments) {
    View v;
    if (n_arguments != 2) return PyErr_Format(PyExc_TypeError, "groups takes 2 arguments");
    if (!read(a[0], v) || (v.type != INT64 && v.type != INT32) || !v.contiguous()) Py_RETURN_NONE;
    const int64_t n = v.numel();
    char *at_ids, *at_offsets, *at_order;
    Ref ids(fresh(v.shape, int(v.ndim), INT64, at_ids));
    if (!ids) return nullptr;
    int64_t* own = reinterpret_cast<int64_t*>(at_ids);
    int64_t most = -1, least = 0;
    bool falls = false;
    auto pass = [&](auto* from) {
        for (int64_t i = 0; i < n; ++i) {
            const int64_t id = from[i];
            own[i] = id;
            most = std::max(most, id), least = std::min(least, id);
        }
        for (int64_t i = 1; i < n; ++i) falls = falls | (own[i] < own[i - 1]);
    };
    if (v.type == INT64) pass(reinterpret_cast<const int64_t*>(v.data));
    else pass(reinterpret_cast<const int32_t*>(v.data));
    int64_t count = most + 1;
    if (a[1] != Py_None) {
        count = PyLong_AsLongLong(a[1]);
        if (PyErr_Occurred()) {
            PyErr_Clear();
            Py_RETURN_NONE;
        }
    }
    if (least < 0 || most >= count || count > 16 * n + (1 << 22)) Py_RETURN_NONE;
    Ref offsets(fresh({count + 1}, INT64, at_offsets)), order;
    if (!offsets) return nullptr;
    int64_t* ends = reinterpret_cast<int64_t*>(at_offsets);
    if (!falls) {
        int64_t group = 0;
        ends[0] = 0;
        for (int64_t i = 0; i < n; ++i)
            while (group < own[i]) ends[++group] = i;
        while (group < count) ends[++group] = n;
    } else {
        if (!(order = fresh({n}, INT64, at_order))) return nullptr;
        std::fill_n(ends, count + 1, int64_t(0));
        for (int64_t i = 0; i < n; ++i) ++ends[own[i] + 1];
        for (int64_t g = 0; g < count; ++g) ends[g + 1] += ends[g];
        std::vector<int64_t> next;
        try {
            next.assign(ends, ends + count);
        } catch (const std::bad_alloc&) {
            return PyErr_NoMemory();
        }
        int64_t* sorted = reinterpret_cast<int64_t*>(at_order);
        for (int64_t i = 0; i < n; ++i) sorted[next[size_t(own[i])]++] = i;
    }
    Ref number(PyLong_FromLongLong(count));
    return number ? PyTuple_Pack(4, ids.get(), number.get(), offsets.get(), order.or_none()) : nullptr;
}

// counts(offsets of groups, x): the number of elements of every group, in the dtype of the statistics of x.
PyObject* counts(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 2) return PyErr_Format(PyExc_TypeError, "counts takes 2 arguments");
    View offsets, x;
    if (!read(a[0], offsets) || !read(a[1], x) || offsets.type != INT64 || offsets.ndim != 1 || offsets.shape[0] < 1) Py_RETURN_NONE;
    if (x.type > F16 || !offsets.contiguous()) Py_RETURN_NONE;
    char* data;
    const int64_t groups = offsets.shape[0] - 1, *at = reinterpret_cast<int64_t*>(offsets.data);
    PyObject* made = fresh({groups}, x.type == F64 ? F64 : F32, data);
    for (int64_t g = 0; made && g < groups; ++g) {
        const int64_t count = at[g + 1] - at[g];
        if (x.type == F64) reinterpret_cast<double*>(data)[g] = double(count);
        else reinterpret_cast<float*>(data)[g] = float(count);
    }
    return made;
}

// --- running statistics ----------------------------------------------------------------------------------------------

template <class T>
void move(View& mean, View& var, const T* m, const T* m2, const int64_t* whole, const T* wide, T count, double momentum,
          bool& any) {
    const int64_t n = mean.numel();
    T *of_mean = reinterpret_cast<T*>(mean.data), *of_var = reinterpret_cast<T*>(var.data);
    const T weight = T(momentum);
    auto lerp = [&](T from, T to) {  // as torch.lerp
        return weight < T(.5) ? from + weight * (to - from) : to - (to - from) * (1 - weight);
    };
    for (int64_t i = 0; i < n; ++i) {
        T c = whole ? T(whole[i]) : wide ? wide[i] : count;
        if (!(c > 0)) continue;
        any = true;
        of_mean[i] = lerp(of_mean[i], m[i]);
        // Weights do not count, so they have no unbiased variance.
        if (wide) of_var[i] = lerp(of_var[i], m2[i] / c);
        else if (c > 1) of_var[i] = lerp(of_var[i], m2[i] / (c - 1));
    }
}

// track(running mean, running variance, number of batches, momentum, moments [3, *sets], count or None, elements of x):
// True, and the running statistics have moved towards those of a batch. None: Python moves them.
PyObject* track(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 7) return PyErr_Format(PyExc_TypeError, "track takes 7 arguments");
    View mean, var, batches, moments, count;
    const double momentum = PyFloat_AsDouble(a[3]);
    const int64_t elements = PyLong_AsLongLong(a[6]);
    if (PyErr_Occurred()) return nullptr;
    if (!read(a[0], mean) || !read(a[1], var) || !read(a[2], batches) || !read(a[4], moments)) Py_RETURN_NONE;
    if (!mean.contiguous() || !var.contiguous() || !moments.contiguous()) Py_RETURN_NONE;
    const int64_t sets = mean.numel();
    if (!sets || var.numel() != sets || moments.numel() != 3 * sets || batches.type != INT64 || batches.ndim != 0) Py_RETURN_NONE;
    if (var.type != mean.type || moments.type != mean.type) Py_RETURN_NONE;
    count.type = TYPES;
    if (a[5] != Py_None) {
        if (!read(a[5], count) || !count.contiguous() || count.numel() != sets) Py_RETURN_NONE;
        if (count.type != INT64 && count.type != mean.type) Py_RETURN_NONE;
    }
    bool any = false;
    auto go = [&](auto one) {
        using T = decltype(one);
        const T* m = reinterpret_cast<const T*>(moments.data);
        const int64_t* whole = count.type == INT64 ? reinterpret_cast<int64_t*>(count.data) : nullptr;
        const T* wide = count.type == mean.type ? reinterpret_cast<const T*>(count.data) : nullptr;
        move<T>(mean, var, m, m + 2 * sets, whole, wide, T(elements / sets), momentum, any);
    };
    if (mean.type == F64) go(double());
    else if (mean.type == F32) go(float());
    else Py_RETURN_NONE;
    *reinterpret_cast<int64_t*>(batches.data) += any;
    Py_RETURN_TRUE;
}

// --- mixtures --------------------------------------------------------------------------------------------------------

// The numbers of a floating tensor, or of a count, in double.
Ready doubles(PyObject* o, std::vector<double>& to, View& v) {
    if (!read(o, v)) return NO;
    Ref kept;
    if (Ready done = take(o, v.type == F64 ? F64 : v.type >= BOOL ? INT64 : F32, v, kept); done != YES) return done;
    auto all = [&](auto* from) { to.assign(from, from + v.numel()); };
    if (v.type == F64) all(reinterpret_cast<const double*>(v.data));
    else if (v.type == F32) all(reinterpret_cast<const float*>(v.data));
    else all(reinterpret_cast<const int64_t*>(v.data));
    return YES;
}

// Logits that broadcast to the shape of the finest sets, and the patterns behind it.
Ready logits_of(PyObject* o, const View& sets, int64_t ways, Logits& logits) {
    View v;
    if (Ready done = doubles(o, logits.value, v); done != YES) return done;
    if (v.ndim < 1 || v.ndim > sets.ndim + 1 || v.shape[v.ndim - 1] != ways || v.type > F64) return NO;
    logits.axes = int(sets.ndim);
    int64_t step = ways;
    for (int64_t a = sets.ndim - 1, d = v.ndim - 2; a >= 0; --a, --d) {
        logits.size[a] = sets.shape[a];
        if (d < 0 || v.shape[d] == 1) continue;
        if (v.shape[d] != sets.shape[a]) return NO;
        logits.step[a] = step, step *= v.shape[d], logits.same = false;
    }
    return YES;
}

// One way: (the pattern from the finest sets to larger ones, or None where it has these themselves; its labels; running mean
// and variance, or twice None).
Ready way_of(PyObject* o, const View& sets, Way& way) {
    if (!PyTuple_Check(o) || PyTuple_Size(o) != 4) return NO;
    PyObject *bytes = PyTuple_GetItem(o, 0), *mean = PyTuple_GetItem(o, 2);
    const int64_t total = sets.numel();
    if (bytes == Py_None) {
        way.dims = int(sets.ndim), way.sets = total;
        std::copy(sets.shape, sets.shape + sets.ndim, way.shape);
    } else {
        const Pattern& p = *pattern_of(bytes);
        Numbers v;
        Tables tables;
        if (p.dims != sets.ndim || !labels_of(p, PyTuple_GetItem(o, 1), v)) return NO;
        v.mask_dims = v.param_dims = -1;
        for (int d = 0; d < p.dims; ++d) v.size[d] = sets.shape[d], v.x[d] = v.y[d] = sets.stride[d];
        Binder b(p, v, tables);
        if (!b.sizes()) return NO;
        way.dims = b.shape(OF_SETS, way.shape), way.sets = b.count(OF_SETS);
        if (way.sets < 1 || way.sets > std::numeric_limits<int32_t>::max()) return NO;
        way.at.resize(size_t(total));
        int32_t* at = way.at.data();
        int64_t step[MOST] = {}, next = 1;
        const Terms& terms = p.operand[OF_SETS];
        for (int i = terms.n - 1; i >= 0; --i) {
            const int term = terms.term[i];
            if (term >= 0) step[term] += next, next *= b.size[term];
            else next *= v.label[~term].count;
        }
        walk(b.size, step, p.rank, total, [&](int64_t s, int64_t index) { at[s] = int32_t(index); });
        next = 1;
        for (int i = terms.n - 1; i >= 0; --i) {
            const int term = terms.term[i], l = ~term;
            if (term >= 0) {
                next *= b.size[term];
                continue;
            }
            int64_t of_ids[MOST] = {}, one = 1;
            for (int j = p.label_rank[l] - 1; j >= 0; --j) of_ids[p.label_axes[l][j]] += one, one *= v.label_size[l][j];
            const int64_t* ids = v.label[l].ids;
            walk(b.size, of_ids, p.rank, total, [&](int64_t s, int64_t index) { at[s] += int32_t(ids[index] * next); });
            next *= v.label[l].count;
        }
    }
    if (mean == Py_None) return YES;
    View v;
    way.runs = true, way.n.assign(size_t(way.sets), 2), way.low.assign(size_t(way.sets), 0);  // known, as two elements are
    if (Ready done = doubles(mean, way.mean, v); done != YES) return done;
    if (Ready done = doubles(PyTuple_GetItem(o, 3), way.m2, v); done != YES) return done;
    if (int64_t(way.mean.size()) != way.sets || int64_t(way.m2.size()) != way.sets) return NO;
    for (double& square : way.m2) square *= 2;
    return YES;
}

// a: count, mean, m2, low or None of the finest sets, ways, logits of means, those of variances or None, eps, whether results
// are mixed.
Ready mixture_of(PyObject* const* a, Mixture& m, View& sets, bool& whole) {
    View v;
    if (Ready done = doubles(a[1], m.mean, sets); done != YES) return done;
    read(a[1], sets);
    if (sets.type > F64 || sets.ndim > MOST) return NO;
    m.total = sets.numel();
    if (m.total < 1 || m.total > std::numeric_limits<int32_t>::max()) return NO;
    if (Ready done = doubles(a[0], m.n, v); done != YES) return done;
    whole = v.type == INT64, m.weighs = !whole;
    if (Ready done = doubles(a[2], m.m2, v); done != YES) return done;
    m.low.assign(size_t(m.total), 0);
    if (a[3] != Py_None)
        if (Ready done = doubles(a[3], m.low, v); done != YES) return done;
    for (const auto* field : {&m.n, &m.m2, &m.low})
        if (int64_t(field->size()) != m.total) return NO;
    const Py_ssize_t ways = PyTuple_Size(a[4]);
    if (ways < 1 || ways > MOST_WAYS) return NO;
    m.ways.resize(size_t(ways));
    for (Py_ssize_t k = 0; k < ways; ++k) {
        Ready done = way_of(PyTuple_GetItem(a[4], k), sets, m.ways[size_t(k)]);
        if (done != YES) return done;
    }
    m.apart = a[6] != Py_None, m.eps = PyFloat_AsDouble(a[7]), m.results = PyObject_IsTrue(a[8]);
    if (Ready done = logits_of(a[5], sets, ways, m.of_means); done != YES) return done;
    if (m.apart)
        if (Ready done = logits_of(a[6], sets, ways, m.of_vars); done != YES) return done;
    if (PyErr_Occurred()) return NO;
    m.prepare();
    return YES;
}

#define MIXTURE                                 \
    Mixture m;                                  \
    View sets;                                  \
    bool whole;                                 \
    switch (safely([&] { return mixture_of(a, m, sets, whole); })) { \
        case NO: PyErr_Clear(); Py_RETURN_NONE; \
        case RAISED: return nullptr;            \
        case YES: break;                        \
    }

template <class T>
void put_all(char* data, const std::vector<double>& from) {
    std::transform(from.begin(), from.end(), reinterpret_cast<T*>(data), [](double value) { return T(value); });
}
void put_all(char* data, int64_t type, const std::vector<double>& from) {
    if (type == F64) put_all<double>(data, from);
    else if (type == F32) put_all<float>(data, from);
    else put_all<int64_t>(data, from);
}

template <class T>
void put_moments(char* data, const Way& w) {
    T *mean = reinterpret_cast<T*>(data), *low = mean + w.sets, *m2 = low + w.sets;
    for (int64_t j = 0; j < w.sets; ++j) {
        mean[j] = T(w.mean[size_t(j)]), m2[j] = T(w.m2[size_t(j)]);
        low[j] = T((w.mean[size_t(j)] - double(mean[j])) + w.low[size_t(j)]);
    }
}

// The moments of one pattern, as `track` reads them: mean, low and M2 side by side, and the count.
PyObject* larger(const Way& w, int64_t type, bool whole) {
    int64_t shape[MOST + 2] = {3};
    char *data, *at_count;
    std::copy(w.shape, w.shape + w.dims, shape + 1);
    Ref packed(fresh(shape, w.dims + 1, type, data)), count(fresh(w.shape, w.dims, whole ? int64_t(INT64) : type, at_count));
    if (!packed || !count) return nullptr;
    if (type == F64) put_moments<double>(data, w);
    else put_moments<float>(data, w);
    put_all(at_count, whole ? int64_t(INT64) : type, w.n);
    return PyTuple_Pack(2, packed.get(), count.get());
}

// mix(as `mixture_of`, for which patterns the moments are wanted; an empty tuple: none): count, mean, m2, low of the mixtures, and a tuple of
// (moments [3, *sets], count) or None for each pattern
PyObject* mix(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 10) return PyErr_Format(PyExc_TypeError, "mix takes 10 arguments");
    MIXTURE
    char* at[4];
    Ref made[4];
    for (int i = 0; i < 4; ++i)
        if (!(made[i] = fresh(sets.shape, int(sets.ndim), sets.type, at[i]))) return nullptr;
    auto go = [&](auto* one) {
        using T = std::decay_t<decltype(*one)>;
        T* to[4];
        for (int i = 0; i < 4; ++i) to[i] = reinterpret_cast<T*>(at[i]);
        m.forward(to[0], to[1], to[2], to[3]);
    };
    if (sets.type == F64) go(static_cast<double*>(nullptr));
    else go(static_cast<float*>(nullptr));
    const size_t wanted = size_t(PyTuple_Size(a[9]));
    Ref all(PyTuple_New(Py_ssize_t(m.ways.size())));
    for (size_t k = 0; all && k < m.ways.size(); ++k) {
        PyObject* one = Py_None;
        if (k < wanted && PyObject_IsTrue(PyTuple_GetItem(a[9], Py_ssize_t(k)))) one = larger(m.ways[k], sets.type, whole);
        else Py_INCREF(one);
        if (!one) return nullptr;
        PyTuple_SetItem(all.get(), Py_ssize_t(k), one);
    }
    return all ? PyTuple_Pack(5, made[0].get(), made[1].get(), made[2].get(), made[3].get(), all.get()) : nullptr;
}

// mix_backward(as `mixture_of`, gradients of the mixed mean and m2 or None): those of mean and m2 of the finest sets, of the
// logits of means, of those of variances or None
PyObject* mix_backward(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 11) return PyErr_Format(PyExc_TypeError, "mix_backward takes 11 arguments");
    MIXTURE
    std::vector<double> given[2], found[2];
    auto ready = safely([&] {
        View v;
        for (int i = 0; i < 2; ++i) {
            found[i].resize(size_t(m.total));
            if (a[9 + i] == Py_None) given[i].assign(size_t(m.total), 0);
            else if (Ready done = doubles(a[9 + i], given[i], v); done != YES) return done;
            if (int64_t(given[i].size()) != m.total) return NO;
        }
        m.backward(given[0], given[1], found[0].data(), found[1].data());
        return YES;
    });
    if (ready == RAISED) return nullptr;
    if (ready == NO) {
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    Ref made[4];
    char* data;
    for (int i = 0; i < 2; ++i) {
        if (!(made[i] = fresh(sets.shape, int(sets.ndim), sets.type, data))) return nullptr;
        put_all(data, sets.type, found[i]);
    }
    for (int i = 0; i < (m.apart ? 2 : 1); ++i) {
        View v;
        read(a[5 + i], v);
        if (!(made[2 + i] = fresh(v.shape, int(v.ndim), v.type == F64 ? F64 : F32, data))) return nullptr;
        put_all(data, v.type == F64 ? F64 : F32, (i ? m.of_vars : m.of_means).gradient);
    }
    return PyTuple_Pack(4, made[0].get(), made[1].get(), made[2].get(), made[3].or_none());
}

// --- the step over sets ----------------------------------------------------------------------------------------------

// Numbers of one kind for every set: some of count, mean, M2 and low, or gradients. None is zeros.
struct OverSets {
    View shape;
    int64_t total = -1;
    std::vector<std::vector<double>> all;

    Ready add(PyObject* o) {
        all.emplace_back();
        if (o == Py_None) {
            all.back().assign(size_t(total < 0 ? 0 : total), 0);
            return total < 0 ? NO : YES;
        }
        View v;
        if (Ready done = doubles(o, all.back(), v); done != YES) return done;
        if (total < 0) shape = v, total = int64_t(all.back().size());
        return int64_t(all.back().size()) == total ? YES : NO;
    }
};

PyObject* over_sets(const View& shape, int type, const std::vector<double>& values) {
    char* data;
    Ref made = fresh(shape.shape, int(shape.ndim), type, data);
    if (!made) return nullptr;
    put_all(data, type, values);
    return made.release();
}

PyObject* pair_or_none(Ready ready, const OverSets& s, int type, std::vector<double>* found, int n) {
    if (ready == RAISED) return nullptr;
    if (ready == NO) {
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    Ref all(PyTuple_New(n));
    for (int i = 0; all && i < n; ++i) {
        PyObject* one = Py_None;
        if (found[i].empty() && s.total) Py_INCREF(one);
        else if (!(one = over_sets(s.shape, type, found[i]))) return nullptr;
        PyTuple_SetItem(all.get(), i, one);
    }
    return all.release();
}

double at_least_one(double count) { return count > 0 ? count : 1; }

// gradients_of_moments(count, mean, M2, sum of g, sum of g xhat, eps, center, scale): those of count (None, if it counts),
// mean and M2, where x is normalized by these moments
PyObject* gradients_of_moments(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 8) return PyErr_Format(PyExc_TypeError, "gradients_of_moments takes 8 arguments");
    const double eps = PyFloat_AsDouble(a[5]);
    const bool center = a[6] == Py_True, scale = a[7] == Py_True;
    if (PyErr_Occurred()) return nullptr;
    OverSets s;
    std::vector<double> found[3];
    View count, mean;
    mean.type = TYPES;
    auto ready = safely([&] {
        if (!read(a[0], count) || !read(a[1], mean) || (mean.type != F32 && mean.type != F64)) return NO;
        for (int i = 0; i < 5; ++i)
            if (Ready done = s.add(a[i]); done != YES) return done;
        const bool weighed = count.type < BOOL;
        for (auto& f : found) f.resize(size_t(s.total));
        if (!weighed) found[0].clear();
        for (size_t i = 0; i < size_t(s.total); ++i) {
            const double c = s.all[0][i], size = at_least_one(c), var = s.all[2][i] / size, square = var + eps;
            const double rate = !scale ? double(c > 0) : c > 0 && square != 0 ? 1 / std::sqrt(square) : 0;
            const double dvar = scale ? -0.5 * rate * rate * s.all[4][i] : 0;
            found[1][i] = center ? -rate * s.all[3][i] : 0;
            found[2][i] = dvar / size;
            if (weighed) found[0][i] = -dvar * var / size;
        }
        return YES;
    });
    return pair_or_none(ready, s, mean.type, found, 3);
}

// sums_of_changed(count, mean, M2, low of the used moments; count, mean, low of the own ones; gradients of their mean and M2
// or None; eps): the sums of which `backward_dx` at the used moments makes the gradient of x
PyObject* sums_of_changed(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 10) return PyErr_Format(PyExc_TypeError, "sums_of_changed takes 10 arguments");
    const double eps = PyFloat_AsDouble(a[9]);
    if (PyErr_Occurred()) return nullptr;
    OverSets s;
    std::vector<double> found[2];
    View mean;
    mean.type = TYPES;
    auto ready = safely([&] {
        if (!read(a[1], mean) || (mean.type != F32 && mean.type != F64)) return NO;
        for (int i = 0; i < 9; ++i)
            if (Ready done = s.add(a[i]); done != YES) return done;
        for (auto& f : found) f.resize(size_t(s.total));
        for (size_t i = 0; i < size_t(s.total); ++i) {
            const double c = s.all[0][i], size = at_least_one(c), square = c > 0 ? s.all[2][i] / size + eps : 0;
            const double apart = (s.all[1][i] - s.all[5][i]) + (s.all[3][i] - s.all[6][i]);
            const double along = s.all[7][i] / at_least_one(s.all[4][i]) + 2 * s.all[8][i] * apart;
            found[0][i] = -size * along * std::sqrt(square);
            found[1][i] = -2 * size * s.all[8][i] * square;
        }
        return YES;
    });
    return pair_or_none(ready, s, mean.type, found, 2);
}

// totals(t): the sum over the last axis at every place of this axis
PyObject* totals(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 1) return PyErr_Format(PyExc_TypeError, "totals takes 1 argument");
    OverSets s;
    std::vector<double> found;
    auto ready = safely([&] {
        if (Ready done = s.add(a[0]); done != YES) return done;
        if (s.shape.ndim < 1 || (s.shape.type != F32 && s.shape.type != F64)) return NO;
        const size_t along = size_t(s.shape.shape[s.shape.ndim - 1]);
        found.resize(size_t(s.total));
        for (size_t i = 0; i < size_t(s.total); i += along) {
            double sum = 0;
            for (size_t k = 0; k < along; ++k) sum += s.all[0][i + k];
            std::fill_n(found.begin() + int64_t(i), along, sum);
        }
        return YES;
    });
    if (ready != YES) return pair_or_none(ready, s, F32, &found, 1);
    return over_sets(s.shape, int(s.shape.type), found);
}

// Where a share, which broadcasts to the shape of the sets, has the value of every set.
bool places_of(const View& share, const View& sets, std::vector<int64_t>& at) {
    if (share.ndim > sets.ndim) return false;
    int64_t total = 1, step[MOST] = {}, own = 1;
    for (int64_t a = sets.ndim - 1, d = share.ndim - 1; a >= 0; --a, --d) {
        total *= sets.shape[a];
        if (d < 0 || share.shape[d] == 1) continue;
        if (share.shape[d] != sets.shape[a]) return false;
        step[a] = own, own *= share.shape[d];
    }
    at.resize(size_t(total));
    int64_t index[MOST] = {}, place = 0;
    for (int64_t i = 0; i < total; ++i) {
        at[size_t(i)] = place;
        for (int64_t a = sets.ndim - 1; a >= 0; --a) {
            place += step[a];
            if (++index[a] < sets.shape[a]) break;
            place -= step[a] * index[a], index[a] = 0;
        }
    }
    return true;
}

// about(count, mean, M2, low, share): mean, M2 and low about a share of the mean
PyObject* about(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 5) return PyErr_Format(PyExc_TypeError, "about takes 5 arguments");
    OverSets s;
    std::vector<double> found[3], share;
    std::vector<int64_t> at;
    View mean, of_share;
    mean.type = TYPES;
    auto ready = safely([&] {
        if (!read(a[1], mean) || (mean.type != F32 && mean.type != F64)) return NO;
        for (int i = 0; i < 4; ++i)
            if (Ready done = s.add(a[i]); done != YES) return done;
        if (Ready done = doubles(a[4], share, of_share); done != YES) return done;
        if (!places_of(of_share, s.shape, at) || int64_t(at.size()) != s.total) return NO;
        for (auto& f : found) f.resize(size_t(s.total));
        for (size_t i = 0; i < size_t(s.total); ++i) {
            const double part = share[size_t(at[i])], whole = s.all[1][i] + s.all[3][i];
            const double to = part * whole, rest = whole - to, high = mean.type == F32 ? double(float(to)) : part * s.all[1][i];
            found[0][i] = high;
            found[1][i] = s.all[2][i] + s.all[0][i] * rest * rest;
            found[2][i] = mean.type == F32 ? to - high : part * s.all[3][i];
        }
        return YES;
    });
    return pair_or_none(ready, s, mean.type, found, 3);
}

// share_backward(count, own mean, M2 of the used moments, share, sum of g, sum of g xhat, eps, scale): the sum of g as
// `backward_dx` takes it, and the gradient of the share. See `Step` in gradients.py.
PyObject* share_backward(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 8) return PyErr_Format(PyExc_TypeError, "share_backward takes 8 arguments");
    const double eps = PyFloat_AsDouble(a[6]);
    const bool scale = a[7] == Py_True;
    if (PyErr_Occurred()) return nullptr;
    OverSets s;
    std::vector<double> found, share, of_share;
    std::vector<int64_t> at;
    View mean, v;
    mean.type = v.type = TYPES;
    auto ready = safely([&] {
        if (!read(a[1], mean) || (mean.type != F32 && mean.type != F64)) return NO;
        for (int i : {0, 1, 2, 4, 5})
            if (Ready done = s.add(a[i]); done != YES) return done;
        if (Ready done = doubles(a[3], share, v); done != YES) return done;
        if ((v.type != F32 && v.type != F64) || !places_of(v, s.shape, at) || int64_t(at.size()) != s.total) return NO;
        found.resize(size_t(s.total)), of_share.assign(share.size(), 0);
        for (size_t i = 0; i < size_t(s.total); ++i) {
            const double c = s.all[0][i], square = s.all[2][i] / at_least_one(c) + eps;
            const double rate = !scale ? double(c > 0) : c > 0 && square != 0 ? 1 / std::sqrt(square) : 0;
            const double scaled = s.all[1][i] * rate, part = share[size_t(at[i])];
            const double rest = (scale ? s.all[4][i] * (1 - part) * scaled : 0) - s.all[3][i];
            found[i] = -part * rest;
            of_share[size_t(at[i])] += rest * scaled;
        }
        return YES;
    });
    if (ready != YES) return pair_or_none(ready, s, mean.type, &found, 1);
    Ref first(over_sets(s.shape, mean.type, found)), second(over_sets(v, v.type, of_share));
    return first && second ? PyTuple_Pack(2, first.get(), second.get()) : nullptr;
}

// --- what the binder chooses, for those who ask ----------------------------------------------------------------------

template <class V>
PyObject* listed(const V* values, int64_t n) {
    PyObject* list = PyTuple_New(Py_ssize_t(n));
    for (int64_t i = 0; list && i < n; ++i) PyTuple_SetItem(list, Py_ssize_t(i), PyLong_FromLongLong(int64_t(values[i])));
    return list;
}

void put(PyObject* dict, const char* name, PyObject* value) {
    Ref own(value);
    if (own) PyDict_SetItemString(dict, name, own.get());
}
void put(PyObject* dict, const char* name, int64_t value) { put(dict, name, PyLong_FromLongLong(value)); }
template <class V>
void put(PyObject* dict, const char* name, const V* values, int64_t n) {
    if (values) put(dict, name, listed(values, n));
}

PyObject* described(const Dim* dims, int64_t n) {
    PyObject* list = PyTuple_New(Py_ssize_t(n));
    for (int64_t i = 0; i < n; ++i) {
        int64_t all[1 + STEPS] = {dims[i].size};
        std::copy(dims[i].step, dims[i].step + STEPS, all + 1);
        PyTuple_SetItem(list, Py_ssize_t(i), listed(all, 1 + STEPS));
    }
    return list;
}

PyObject* described(const Column& c, int64_t columns) {
    PyObject* dict = PyDict_New();
    put(dict, "kind", c.kind), put(dict, "count", c.count), put(dict, "blocks", c.blocks);
    if (c.kind == TABLE) put(dict, "table", c.table, c.blocks * columns);
    put(dict, "offsets", c.offsets, c.count);
    return dict;
}

// bind(pattern, dtype, sizes of x, its strides, those of y, kind of the mask, labels as for `prepare`, or None): the form,
// as a dict. Without labels: only the axes in the order of the memory, the place of the cut and the kinds.
PyObject* bind(PyObject*, PyObject* const* a, Py_ssize_t n_arguments) {
    if (n_arguments != 7) return PyErr_Format(PyExc_TypeError, "bind takes 7 arguments");
    const Pattern& p = *pattern_of(a[0]);
    Numbers v;
    Tables tables;
    Form f;
    View t;
    int32_t dims[3];
    v.dtype = PyLong_AsLongLong(a[1]), v.mask_kind = PyLong_AsLongLong(a[5]), v.mask_dims = v.param_dims = -1;
    if (!numbers(a[2], v.size, dims[0]) || !numbers(a[3], v.x, dims[1]) || !numbers(a[4], v.y, dims[2])) Py_RETURN_NONE;
    if (dims[0] != p.dims || dims[1] != p.dims || dims[2] != p.dims) Py_RETURN_NONE;
    const bool labelled = a[6] != Py_None;
    for (int l = 0; l < p.labels; ++l) {
        if (!labelled) {  // counts are not read before tables are made
            v.label[l] = Label{nullptr, 1, nullptr, nullptr};
            continue;
        }
        PyObject* label = PyTuple_GetItem(a[6], l);
        if (!read(PyTuple_GetItem(label, 0), t) || t.type != INT64 || t.ndim != p.label_rank[l]) Py_RETURN_NONE;
        v.label[l].ids = reinterpret_cast<int64_t*>(t.data);
        std::copy(t.shape, t.shape + t.ndim, v.label_size[l]);
        v.label[l].count = PyLong_AsLongLong(PyTuple_GetItem(label, 1));
        if (!read(PyTuple_GetItem(label, 2), t)) Py_RETURN_NONE;
        v.label[l].offsets = reinterpret_cast<int64_t*>(t.data), v.label[l].order = nullptr;
        if (PyObject* order = PyTuple_GetItem(label, 3); order != Py_None && read(order, t))
            v.label[l].order = reinterpret_cast<int64_t*>(t.data);
    }
    Binder b(p, v, tables);
    if (!labelled)
        for (int l = 0; l < p.labels; ++l) std::fill_n(v.label_size[l], MOST, int64_t(0));
    if (!b.sizes(labelled)) Py_RETURN_NONE;
    Ref made(PyDict_New());
    PyObject* to = made.get();
    if (!labelled) b.choose();
    else if (!b.form(f, v.mask_kind != EVERYTHING)) Py_RETURN_NONE;
    int64_t kinds[OPERANDS];
    b.kinds(kinds);
    put(to, "order", b.order, b.n), put(to, "cut", b.cut), put(to, "copied", b.copied), put(to, "kinds", kinds, OPERANDS);
    if (!labelled) return made.release();
    put(to, "columns", f.columns), put(to, "injective", f.injective), put(to, "numel", f.numel);
    put(to, "outer", described(f.outer, f.n_outer)), put(to, "inner", described(f.inner, f.n_inner));
    put(to, "segment", described(f.segment, f.n_segment)), put(to, "groups", f.groups);
    put(to, "outer_at", f.outer_at), put(to, "inner_at", f.inner_at), put(to, "segment_step", f.segment_step);
    int64_t elements = f.n_segment ? 1 : 0, labels_of = 1;
    for (int i = 0; i < f.n_segment; ++i) elements *= f.segment[i].size;
    if (elements) put(to, "group_offsets", f.offsets, f.groups + 1), put(to, "group_order", f.order, elements);
    put(to, "group_sets", f.segment_sets, f.groups);
    put(to, "sets", described(f.sets, f.columns)), put(to, "mask", described(f.mask, f.columns));
    put(to, "params", described(f.params, f.columns));
    if (f.param_label) labels_of = int64_t(tables.param_label.size());
    put(to, "param_label", f.param_label, labels_of);
    put(to, "n_sets", f.n_sets), put(to, "count", int64_t(f.count));
    put(to, "few", f.few), put(to, "apart", f.apart), put(to, "shared", f.shared), put(to, "by_runs", f.by_runs), put(to, "chunk", f.chunk);
    return PyErr_Occurred() ? nullptr : made.release();
}

// sizes(pattern, x): the sizes of the elementary axes.
PyObject* sizes(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 2) return PyErr_Format(PyExc_TypeError, "sizes takes 2 arguments");
    const Pattern& p = *pattern_of(a[0]);
    Numbers v;
    Tables tables;
    View x;
    if (!read(a[1], x) || x.ndim != p.dims) Py_RETURN_NONE;
    v.mask_dims = v.param_dims = -1;
    std::copy(x.shape, x.shape + x.ndim, v.size), std::copy(x.stride, x.stride + x.ndim, v.x), std::copy(x.stride, x.stride + x.ndim, v.y);
    Binder b(p, v, tables);
    if (!b.sizes(false)) Py_RETURN_NONE;
    return listed(b.size, p.rank);
}

// --- the module ------------------------------------------------------------------------------------------------------

// setup(torch, convert, copy, table of DLPack functions or None)
PyObject* setup(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n != 4) return PyErr_Format(PyExc_TypeError, "setup takes 4 arguments");
    auto of = [&](const char* name) { return PyObject_GetAttrString(a[0], name); };
    const char* names[TYPES] = {"float32", "float64", "bfloat16", "float16", "bool", "int64", "int32"};
    for (int i = 0; i < TYPES; ++i) torch.dtypes[i] = of(names[i]);
    torch.tensor = reinterpret_cast<PyTypeObject*>(of("Tensor"));
    Ref nn(of("nn"));
    if (!nn) return nullptr;
    torch.parameter = reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(nn.get(), "Parameter"));
    torch.empty = of("empty"), torch.empty_like = of("empty_like"), torch.num_threads = of("get_num_threads");
    torch.strided = of("strided");
    Py_INCREF(a[1]), Py_INCREF(a[2]);
    torch.convert = a[1], torch.copy = a[2];
    torch.is_neg = PyUnicode_InternFromString("is_neg"), torch.data_ptr = PyUnicode_InternFromString("data_ptr");
    torch.shape = PyUnicode_InternFromString("shape"), torch.stride = PyUnicode_InternFromString("stride");
    torch.dtype = PyUnicode_InternFromString("dtype"), torch.device = PyUnicode_InternFromString("device");
    torch.type = PyUnicode_InternFromString("type"), torch.layout = PyUnicode_InternFromString("layout");
    torch.cpu = PyUnicode_InternFromString("cpu");
    torch.api = nullptr;
    if (a[3] != Py_None) {
        auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(a[3], "dlpack_exchange_api"));
        if (!api) return nullptr;
        if (api->major == 1 && api->read && api->allocate && api->to_object) torch.api = api;
    }
    if (PyErr_Occurred()) return nullptr;
    return PyBool_FromLong(torch.api != nullptr);
}

PyObject* width(PyObject*, PyObject* const*, Py_ssize_t) { return PyLong_FromLong(vector_width()); }
PyObject* set_width(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n == 1) set_vector_width(int(PyLong_AsLong(a[0])));
    Py_RETURN_NONE;
}

// set_pages(0: large results are asked for their pages; 1: they are taken as fresh; 2: as resident)
PyObject* set_pages(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (n == 1) pages = Pages(PyLong_AsLong(a[0]));
    Py_RETURN_NONE;
}

#define FUNCTION(name) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(name)), METH_FASTCALL, nullptr}
PyMethodDef functions[] = {FUNCTION(setup), FUNCTION(pattern), FUNCTION(evaluate), FUNCTION(forward), FUNCTION(statistics),
                           FUNCTION(apply), FUNCTION(backward), FUNCTION(backward_sums), FUNCTION(backward_dx),
                           FUNCTION(groups), FUNCTION(counts), FUNCTION(track), FUNCTION(mix), FUNCTION(mix_backward),
                           FUNCTION(gradients_of_moments), FUNCTION(sums_of_changed), FUNCTION(about), FUNCTION(share_backward), FUNCTION(totals), FUNCTION(bind), FUNCTION(sizes), FUNCTION(width), FUNCTION(set_width), FUNCTION(set_pages),
                           {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() {
    PyObject* module = PyModule_Create(&definition);
    if (module) PyModule_AddIntConstant(module, "INTERFACE", 5);  // one more where an entry takes other arguments
    return module;
}
