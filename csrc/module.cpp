// kdkernels._native: the launchers as Python functions over addresses. Each takes one dict, its arguments by name.
// Sizes, strides and dtypes are checked by the caller (kdkernels/<op>/op.py) before any address crosses over. Every
// kernel runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "dlpack.h"
#include "level.h"
#include "ops.h"
#include "pool.h"

namespace py = pybind11;

namespace {

// (address, dtype code, row stride, column stride), strides in elements
Matrix matrix(const py::handle& value) {
  const auto t = value.cast<py::tuple>();
  return Matrix{reinterpret_cast<const void*>(t[0].cast<uintptr_t>()), static_cast<DType>(t[1].cast<int>()),
                t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

// The arguments of one call by name: each is read once, and at the cost of one comparison where Python gives them in
// the order of the reads. 18 names cost 0.8 us more than positions; as py::arg or py::kwargs 2.3 us more.
class Arguments {
 public:
  Arguments(const char* function, const py::dict& given) : function_(function), given_(given) {}

  template <typename T>
  T value(const char* name) {
    return find(name).cast<T>();
  }

  template <typename T>
  T* address(const char* name) {
    return reinterpret_cast<T*>(value<uintptr_t>(name));
  }

  Matrix matrix(const char* name) { return ::matrix(find(name)); }

  // (matrix, first row, rows, columns)
  RowRange row_range(const char* name) {
    const auto t = find(name).cast<py::tuple>();
    return RowRange{::matrix(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
  }

  // The last argument of every launcher; none may be left over.
  int threads() {
    const int count = value<int>("threads");
    finish();
    return count;
  }

  void finish() const {
    if (read_ != py::len(given_)) throw py::type_error(std::string(function_) + ": unknown argument");
  }

 private:
  py::handle find(const char* name) {
    ++read_;
    PyObject *key = nullptr, *found = nullptr;
    if (PyDict_Next(given_.ptr(), &position_, &key, &found) && PyUnicode_CompareWithASCIIString(key, name) == 0)
      return found;
    found = PyDict_GetItemString(given_.ptr(), name);
    if (found == nullptr) throw py::type_error(std::string(function_) + ": argument " + name + " is missing");
    return found;
  }

  const char* function_;
  const py::dict& given_;
  Py_ssize_t position_ = 0;
  size_t read_ = 0;
};

// Shared by both calls of the fused rows.
KdCrossEntropyArgs kd_cross_entropy_args(Arguments& given) {
  KdCrossEntropyArgs args{};
  args.student = given.matrix("student");
  args.teacher = given.matrix("teacher");
  args.target = given.address<const void>("target");
  args.target_is_int64 = given.value<bool>("target_is_int64");
  args.target_stride = given.value<int64_t>("target_stride");
  args.rows = given.value<int64_t>("rows");
  args.classes = given.value<int64_t>("classes");
  args.temperature = given.value<float>("temperature");
  args.alpha = given.value<float>("alpha");
  args.label_smoothing = given.value<float>("label_smoothing");
  args.ignore_index = given.value<int64_t>("ignore_index");
  args.loss = given.address<float>("loss");
  args.terms = given.address<RowTerms>("terms");
  args.gradient = given.address<void>("gradient");
  return args;
}

void bind_kd_cross_entropy(py::module_& m) {
  m.def(
      "kd_cross_entropy",
      [](const py::dict& arguments) {
        Arguments given("kd_cross_entropy", arguments);
        const KdCrossEntropyArgs args = kd_cross_entropy_args(given);
        const bool mean = given.value<bool>("mean");
        float* const reduced = given.address<float>("reduced");
        float* const post_scale = given.address<float>("post_scale");
        const int threads = given.threads();
        const py::gil_scoped_release release;
        return kd_cross_entropy(args, mean, reduced, post_scale, threads);
      },
      "Loss, terms and gradient of every row; returns the first row with a bad label, -1 if none.");
  m.def(
      "kd_cross_entropy_chunk",
      [](const py::dict& arguments) {
        Arguments given("kd_cross_entropy_chunk", arguments);
        KdCrossEntropyArgs args = kd_cross_entropy_args(given);
        args.gradient_stride = given.value<int64_t>("gradient_stride");
        args.gradient_scale = given.value<float>("gradient_scale");
        args.margin = given.address<const RowMargin>("margin");
        const int threads = given.threads();
        const py::gil_scoped_release release;
        kd_cross_entropy_chunk(args, threads);
      },
      "Loss, terms and gradient of the rows of a chunk; the gradient may take the place of the logits.");
}

void bind_sparse_teacher(py::module_& m) {
  m.def(
      "sparse_teacher_tail",
      [](const py::dict& arguments) {
        Arguments given("sparse_teacher_tail", arguments);
        SparseTeacherArgs args{};
        args.logits = given.address<float>("logits");
        args.stride = given.value<int64_t>("stride");
        args.rows = given.value<int64_t>("rows");
        args.classes = given.value<int64_t>("classes");
        args.temperature = given.value<float>("temperature");
        args.statistics = given.address<TailStatistics>("statistics");
        args.factors = given.address<const TailFactors>("factors");
        const int threads = given.threads();
        const py::gil_scoped_release release;
        sparse_teacher_tail(args, threads);
      },
      "Sums of the rows of a chunk, or their gradient in the place of the logits.");
}

void bind_give_gradient(py::module_& m) {
  m.def(
      "give_gradient",
      [](const py::dict& arguments) {
        Arguments given("give_gradient", arguments);
        GiveGradientArgs args{};
        args.data = given.address<void>("data");
        args.dtype = static_cast<DType>(given.value<int>("dtype"));
        args.rows = given.value<int64_t>("rows");
        args.columns = given.value<int64_t>("columns");
        args.factor = given.value<float>("factor");
        args.per_row = given.address<const float>("per_row");
        args.per_row_stride = given.value<int64_t>("per_row_stride");
        const int threads = given.threads();
        const py::gil_scoped_release release;
        give_gradient(args, threads);
      },
      "Scales a stored gradient in place.");
}

void bind_triplet_loss(py::module_& m) {
  m.def(
      "triplet_loss",
      [](const py::dict& arguments) {
        Arguments given("triplet_loss", arguments);
        TripletArgs args{};
        args.anchor = given.matrix("anchor");
        args.positive = given.matrix("positive");
        args.negative = given.matrix("negative");
        args.rows = given.value<int64_t>("rows");
        args.features = given.value<int64_t>("features");
        args.margin = given.value<double>("margin");
        args.eps = given.value<float>("eps");
        args.squared = given.value<bool>("squared");
        args.active_at_zero = given.value<bool>("active_at_zero");
        const bool mean = given.value<bool>("mean");
        args.loss = given.address<float>("loss");
        args.gradient_anchor = given.address<void>("gradient_anchor");
        args.gradient_positive = given.address<void>("gradient_positive");
        args.gradient_negative = given.address<void>("gradient_negative");
        float* const reduced = given.address<float>("reduced");
        float* const post_scale = given.address<float>("post_scale");
        const int threads = given.threads();
        const py::gil_scoped_release release;
        triplet_loss(args, mean, reduced, post_scale, threads);
      },
      "Loss of every row and the wanted gradients.");
}

void bind_batch_triplet_loss(py::module_& m) {
  m.def(
      "batch_triplet_center",
      [](const py::dict& arguments) {
        Arguments given("batch_triplet_center", arguments);
        CenterArgs args{};
        args.embeddings = given.matrix("embeddings");
        args.rows = given.value<int64_t>("rows");
        args.features = given.value<int64_t>("features");
        args.staged = given.address<float>("staged");
        args.shift = given.address<float>("shift");
        args.centered = given.address<float>("centered");
        args.norms = given.address<float>("norms");
        const int threads = given.threads();
        const py::gil_scoped_release release;
        return batch_triplet_center(args, threads);
      },
      "Embeddings minus their mean, padded, and squared norms; returns whether these are finite.");
  m.def(
      "batch_triplet_mine",
      [](const py::dict& arguments) {
        Arguments given("batch_triplet_mine", arguments);
        MineArgs args{};
        args.embeddings = given.address<const float>("embeddings");
        args.stride = given.value<int64_t>("stride");
        args.rows = given.value<int64_t>("rows");
        args.features = given.value<int64_t>("features");
        args.norms = given.address<const float>("norms");
        args.matrix = given.address<float>("gram");
        args.close = given.address<uint64_t>("close");
        Labels labels{};
        labels.data = given.address<const void>("labels");
        labels.is_int64 = given.value<bool>("labels_are_int64");
        labels.stride = given.value<int64_t>("label_stride");
        args.mining = static_cast<Mining>(given.value<int>("mining"));
        args.squared = given.value<bool>("squared");
        args.want_gradient = given.value<bool>("want_gradient");
        args.margin = given.value<double>("margin");
        float* const loss = given.address<float>("loss");
        const int threads = given.threads();
        AnchorTotals totals{};
        {
          const py::gil_scoped_release release;
          totals = batch_triplet_mine(args, labels, loss, threads);
        }
        return py::make_tuple(totals.loss, totals.triplets, totals.active);
      },
      "Loss of every anchor; the Gram matrix becomes the coefficients. Returns total loss, triplets, active triplets.");
  m.def(
      "batch_triplet_spread",
      [](const py::dict& arguments) {
        Arguments given("batch_triplet_spread", arguments);
        SpreadArgs args{};
        args.embeddings = given.address<const float>("embeddings");
        args.stride = given.value<int64_t>("stride");
        args.rows = given.value<int64_t>("rows");
        args.features = given.value<int64_t>("features");
        args.centered = given.address<const float>("centered");
        args.coefficients = given.address<const float>("coefficients");
        args.sums = given.address<float>("sums");
        args.close = given.address<const uint64_t>("close");
        args.weights = given.address<const float>("weights");
        args.factor = given.value<float>("factor");
        const bool finite = given.value<bool>("finite");
        args.gradient = given.address<float>("gradient");
        const int threads = given.threads();
        const py::gil_scoped_release release;
        return batch_triplet_spread(args, finite, threads);
      },
      "Symmetric pair coefficients and the gradient but for their product with the centered embeddings; returns "
      "whether "
      "that product is still to be subtracted.");
}

// (address, dtype code, strides in elements), address 0 where there is no tensor
Strided strided(const py::handle& t) {
  const auto fields = t.cast<py::tuple>();
  Strided value{reinterpret_cast<void*>(fields[0].cast<uintptr_t>()), static_cast<DType>(fields[1].cast<int>()), {}};
  int dims = 0;
  for (const py::handle stride : fields[2].cast<py::tuple>()) value.strides[dims++] = stride.cast<int64_t>();
  return value;
}

void bind_hidden_l2(py::module_& m) {
  m.def(
      "hidden_l2",
      [](const py::dict& arguments) {
        Arguments given("hidden_l2", arguments);
        std::vector<HiddenL2Input> inputs;
        for (const py::handle pair : given.value<py::list>("pairs")) {
          const auto fields = pair.cast<py::tuple>();
          HiddenL2Input input{};
          input.student = strided(fields[0]);
          input.teacher = strided(fields[1]);
          input.gradient = strided(fields[2]);
          for (const py::handle size : fields[3].cast<py::tuple>()) input.sizes[input.dims++] = size.cast<int64_t>();
          input.weight = fields[4].cast<double>();
          input.scale = fields[5].cast<double>();
          inputs.push_back(input);
        }
        float* const loss = given.address<float>("loss");
        float* const terms = given.address<float>("terms");
        float* const post_scale = given.address<float>("post_scale");
        const int threads = given.threads();
        const py::gil_scoped_release release;
        hidden_l2(inputs, loss, terms, post_scale, threads);
      },
      "Weighted squared distances and gradients of all pairs: (student, teacher, gradient, sizes, weight, scale) "
      "each.");
  m.def(
      "hidden_l2_give",
      [](const py::dict& arguments) {
        Arguments given("hidden_l2_give", arguments);
        std::vector<HiddenL2Given> gradients;
        for (const py::handle gradient : given.value<py::list>("gradients")) {
          const auto fields = gradient.cast<py::tuple>();
          gradients.push_back({reinterpret_cast<void*>(fields[0].cast<uintptr_t>()),
                               static_cast<DType>(fields[1].cast<int>()), fields[2].cast<int64_t>(),
                               fields[3].cast<float>()});
        }
        const int threads = given.threads();
        const py::gil_scoped_release release;
        hidden_l2_give(gradients, threads);
      },
      "Scales stored gradients in place: (address, dtype code, elements, factor) each.");
}

void bind_nearest_neighbor(py::module_& m) {
  m.def(
      "nearest_begin",
      [](const py::dict& arguments) {
        Arguments given("nearest_begin", arguments);
        auto* const nearest = given.address<Nearest>("nearest");
        const auto rows = given.value<int64_t>("rows");
        given.finish();
        nearest_begin(nearest, rows);
      },
      "Nothing found yet, for (rows,) records of 16 bytes.");
  m.def(
      "nearest_center",
      [](const py::dict& arguments) {
        Arguments given("nearest_center", arguments);
        const RowRange gallery = given.row_range("gallery");
        float* const center = given.address<float>("center");
        const int threads = given.threads();
        const py::gil_scoped_release release;
        nearest_center(gallery, center, threads);
      },
      "The point that is taken off every row.");
  m.def(
      "nearest_norms",
      [](const py::dict& arguments) {
        Arguments given("nearest_norms", arguments);
        const RowRange rows = given.row_range("rows");
        const float* const center = given.address<const float>("center");
        float* const norms = given.address<float>("norms");
        const int threads = given.threads();
        const py::gil_scoped_release release;
        nearest_norms(rows, center, norms, threads);
      },
      "Squared norms of centered rows.");
  m.def(
      "nearest_stage",
      [](const py::dict& arguments) {
        Arguments given("nearest_stage", arguments);
        const StageArgs args{given.row_range("rows"),
                             given.value<int64_t>("column"),
                             given.value<int64_t>("width"),
                             given.address<const float>("center"),
                             given.address<const float>("norms"),
                             given.value<float>("factor"),
                             given.address<float>("out")};
        const int threads = given.threads();
        const py::gil_scoped_release release;
        nearest_stage(args, threads);
      },
      "Some columns of centered rows as contiguous floats.");
  m.def(
      "nearest_scan",
      [](const py::dict& arguments) {
        Arguments given("nearest_scan", arguments);
        ScanArgs args{};
        args.queries = given.row_range("queries");
        args.gallery = given.row_range("gallery");
        args.products = given.address<float>("products");
        args.query_norms = given.address<const float>("query_norms");
        const float* const gallery_norms = given.address<const float>("gallery_norms");
        args.relative_error = given.value<double>("relative_error");
        args.absolute_error = given.value<double>("absolute_error");
        args.leave_one_out = given.value<bool>("leave_one_out");
        args.nearest = given.address<Nearest>("nearest");
        const int threads = given.threads();
        const py::gil_scoped_release release;
        nearest_scan(args, gallery_norms, threads);
      },
      "Brings the nearest rows up to date with one tile of products.");
  m.def(
      "nearest_finish",
      [](const py::dict& arguments) {
        Arguments given("nearest_finish", arguments);
        const auto* const nearest = given.address<const Nearest>("nearest");
        const auto first = given.value<int64_t>("first");
        const auto rows = given.value<int64_t>("rows");
        const bool leave_one_out = given.value<bool>("leave_one_out");
        auto* const distance = given.address<float>("distance");
        auto* const index = given.address<int64_t>("index");
        given.finish();
        nearest_finish(nearest, first, rows, leave_one_out, distance, index);
      },
      "Distances and indices from the records.");
}

// A DLPack tensor over a pooled buffer; its deleter, which torch may call on any thread, gives the buffer back.
struct Pooled {
  DLManagedTensor managed{};
  std::vector<int64_t> shape, strides;
  pool::Buffer buffer{};
};

py::capsule pooled(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, int dtype) {
  const bool wide = dtype == kFloat32;
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  auto owned = std::make_unique<Pooled>();
  owned->shape = shape;
  owned->strides = strides;
  owned->buffer = pool::take(static_cast<size_t>(elements) * (wide ? 4 : 2));
  DLTensor& tensor = owned->managed.dl_tensor;
  tensor.data = owned->buffer.data;
  tensor.device = DLDevice{1, 0};
  tensor.ndim = static_cast<int32_t>(shape.size());
  tensor.dtype = DLDataType{static_cast<uint8_t>(dtype == kBFloat16 ? 4 : 2), static_cast<uint8_t>(wide ? 32 : 16), 1};
  tensor.shape = owned->shape.data();
  tensor.strides = owned->strides.data();
  owned->managed.manager_ctx = owned.get();
  owned->managed.deleter = [](DLManagedTensor* self) {
    auto* mine = static_cast<Pooled*>(self->manager_ctx);
    pool::give_back(mine->buffer);
    delete mine;
  };
  DLManagedTensor* managed = &owned.release()->managed;
  // A capsule that was not consumed still owns its tensor; a consumer renames it "used_dltensor".
  return py::capsule(managed, "dltensor", [](PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor")) {
      auto* unused = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
      unused->deleter(unused);
    }
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  bind_kd_cross_entropy(m);
  bind_sparse_teacher(m);
  bind_give_gradient(m);
  bind_triplet_loss(m);
  bind_batch_triplet_loss(m);
  bind_hidden_l2(m);
  bind_nearest_neighbor(m);
  m.def("pooled", &pooled, "A DLPack capsule of uninitialized memory from the pool.");
  m.def("empty_pool", &pool::empty);
  m.def("idle_pool", &pool::idle);
  m.def("level", [] { return static_cast<int>(current_level()); });
  m.def("set_level", [](int level) { return level >= 0 && set_level(static_cast<Level>(level)); });
}
