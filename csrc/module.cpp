// kdkernels._native: the launchers as Python functions over addresses. Sizes, strides and dtypes are checked by the
// caller (kdkernels/<op>/op.py) before any address crosses over. Every kernel runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "dlpack.h"
#include "level.h"
#include "ops.h"
#include "pool.h"

namespace py = pybind11;

namespace {

template <typename T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// (address, dtype code, row stride, column stride), strides in elements
Matrix matrix(const py::tuple& t) {
  return Matrix{address<const void>(t[0].cast<uintptr_t>()), static_cast<DType>(t[1].cast<int>()), t[2].cast<int64_t>(),
                t[3].cast<int64_t>()};
}

void bind_kd_cross_entropy(py::module_& m) {
  m.def(
      "kd_cross_entropy",
      [](const py::tuple& student, const py::tuple& teacher, uintptr_t target, bool target_is_int64,
         int64_t target_stride, int64_t rows, int64_t classes, float temperature, float alpha, float label_smoothing,
         int64_t ignore_index, bool mean, uintptr_t loss, uintptr_t terms, uintptr_t statistics, uintptr_t gradient,
         uintptr_t reduced, uintptr_t post_scale, int threads) {
        KdCrossEntropyArgs args{};
        args.student = matrix(student);
        args.teacher = matrix(teacher);
        args.target = address<const void>(target);
        args.target_is_int64 = target_is_int64;
        args.target_stride = target_stride;
        args.rows = rows;
        args.classes = classes;
        args.temperature = temperature;
        args.alpha = alpha;
        args.label_smoothing = label_smoothing;
        args.ignore_index = ignore_index;
        args.loss = address<float>(loss);
        args.terms = address<RowTerms>(terms);
        args.statistics = address<RowStatistics>(statistics);
        args.gradient = address<void>(gradient);
        const py::gil_scoped_release release;
        return kd_cross_entropy(args, mean, address<float>(reduced), address<float>(post_scale), threads);
      },
      "Loss, terms and gradient of every row; returns the first row with a bad label, -1 if none.");
  m.def(
      "kd_cross_entropy_chunk",
      [](const py::tuple& student, const py::tuple& teacher, uintptr_t target, bool target_is_int64,
         int64_t target_stride, int64_t rows, int64_t classes, float temperature, float alpha, float label_smoothing,
         int64_t ignore_index, float gradient_scale, uintptr_t margin, uintptr_t loss, uintptr_t terms,
         uintptr_t gradient, int64_t gradient_stride, int threads) {
        KdCrossEntropyArgs args{};
        args.student = matrix(student);
        args.teacher = matrix(teacher);
        args.target = address<const void>(target);
        args.target_is_int64 = target_is_int64;
        args.target_stride = target_stride;
        args.rows = rows;
        args.classes = classes;
        args.temperature = temperature;
        args.alpha = alpha;
        args.label_smoothing = label_smoothing;
        args.ignore_index = ignore_index;
        args.gradient_scale = gradient_scale;
        args.margin = address<const RowMargin>(margin);
        args.loss = address<float>(loss);
        args.terms = address<RowTerms>(terms);
        args.gradient = address<void>(gradient);
        args.gradient_stride = gradient_stride;
        const py::gil_scoped_release release;
        kd_cross_entropy_chunk(args, threads);
      },
      "Loss, terms and gradient of the rows of a chunk; the gradient may take the place of the logits.");
}

void bind_kd_tail(py::module_& m) {
  m.def(
      "kd_tail",
      [](uintptr_t logits, int64_t stride, int64_t rows, int64_t classes, float temperature, uintptr_t statistics,
         uintptr_t factors, int threads) {
        const KdTailArgs args{address<float>(logits),
                              stride,
                              rows,
                              classes,
                              temperature,
                              address<TailStatistics>(statistics),
                              address<const TailFactors>(factors)};
        const py::gil_scoped_release release;
        kd_tail(args, threads);
      },
      "Sums of the rows of a chunk, or their gradient in the place of the logits.");
}

void bind_give_gradient(py::module_& m) {
  m.def(
      "give_gradient",
      [](uintptr_t data, int dtype, int64_t rows, int64_t columns, float factor, uintptr_t per_row,
         int64_t per_row_stride, int threads) {
        const GiveGradientArgs args{
            address<void>(data), static_cast<DType>(dtype), rows, columns, factor, address<const float>(per_row),
            per_row_stride};
        const py::gil_scoped_release release;
        give_gradient(args, threads);
      },
      "Scales a stored gradient in place.");
}

void bind_triplet_loss(py::module_& m) {
  m.def(
      "triplet_loss",
      [](const py::tuple& anchor, const py::tuple& positive, const py::tuple& negative, int64_t rows, int64_t features,
         double margin, float eps, bool squared, bool active_at_zero, bool mean, uintptr_t loss,
         uintptr_t gradient_anchor, uintptr_t gradient_positive, uintptr_t gradient_negative, uintptr_t reduced,
         uintptr_t post_scale, int threads) {
        TripletArgs args{};
        args.anchor = matrix(anchor);
        args.positive = matrix(positive);
        args.negative = matrix(negative);
        args.rows = rows;
        args.features = features;
        args.margin = margin;
        args.eps = eps;
        args.squared = squared;
        args.active_at_zero = active_at_zero;
        args.loss = address<float>(loss);
        args.gradient_anchor = address<void>(gradient_anchor);
        args.gradient_positive = address<void>(gradient_positive);
        args.gradient_negative = address<void>(gradient_negative);
        const py::gil_scoped_release release;
        triplet_loss(args, mean, address<float>(reduced), address<float>(post_scale), threads);
      },
      "Loss of every row and the wanted gradients.");
}

void bind_batch_triplet(py::module_& m) {
  m.def(
      "batch_triplet_centre",
      [](const py::tuple& embeddings, int64_t rows, int64_t features, uintptr_t staged, uintptr_t shift,
         uintptr_t centred, uintptr_t norms, int threads) {
        const CentreArgs args{matrix(embeddings),
                              rows,
                              features,
                              address<float>(staged),
                              address<float>(shift),
                              address<float>(centred),
                              address<float>(norms)};
        const py::gil_scoped_release release;
        return batch_triplet_centre(args, threads);
      },
      "Embeddings minus their mean, padded, and squared norms; returns whether these are finite.");
  m.def(
      "batch_triplet_mine",
      [](uintptr_t embeddings, int64_t stride, int64_t rows, int64_t features, uintptr_t norms, uintptr_t gram,
         uintptr_t close, uintptr_t labels, bool labels_are_int64, int64_t label_stride, int mining, bool squared,
         bool want_gradient, double margin, uintptr_t loss, int threads) {
        MineArgs args{};
        args.embeddings = address<const float>(embeddings);
        args.stride = stride;
        args.rows = rows;
        args.features = features;
        args.norms = address<const float>(norms);
        args.matrix = address<float>(gram);
        args.close = address<uint64_t>(close);
        args.mining = static_cast<Mining>(mining);
        args.squared = squared;
        args.want_gradient = want_gradient;
        args.margin = margin;
        const Labels people{address<const void>(labels), labels_are_int64, label_stride};
        AnchorTotals totals{};
        {
          const py::gil_scoped_release release;
          totals = batch_triplet_mine(args, people, address<float>(loss), threads);
        }
        return py::make_tuple(totals.loss, totals.triplets, totals.active);
      },
      "Loss of every anchor; the Gram matrix becomes the coefficients. Returns total loss, triplets, active triplets.");
  m.def(
      "batch_triplet_spread",
      [](uintptr_t embeddings, int64_t stride, int64_t rows, int64_t features, uintptr_t centred,
         uintptr_t coefficients, uintptr_t sums, uintptr_t close, uintptr_t weights, float factor, bool finite,
         uintptr_t gradient, int threads) {
        SpreadArgs args{};
        args.embeddings = address<const float>(embeddings);
        args.stride = stride;
        args.rows = rows;
        args.features = features;
        args.centred = address<const float>(centred);
        args.coefficients = address<const float>(coefficients);
        args.sums = address<float>(sums);
        args.close = address<const uint64_t>(close);
        args.weights = address<const float>(weights);
        args.factor = factor;
        args.gradient = address<float>(gradient);
        const py::gil_scoped_release release;
        return batch_triplet_spread(args, finite, threads);
      },
      "Symmetric pair coefficients and the gradient but for their product with the centred embeddings; returns whether "
      "that product is still to be subtracted.");
}

// (address, dtype code, strides in elements), address 0 where there is no tensor
Strided strided(const py::handle& t) {
  const auto fields = t.cast<py::tuple>();
  Strided value{address<void>(fields[0].cast<uintptr_t>()), static_cast<DType>(fields[1].cast<int>()), {}};
  int dims = 0;
  for (const py::handle stride : fields[2].cast<py::tuple>()) value.strides[dims++] = stride.cast<int64_t>();
  return value;
}

void bind_hidden_l2(py::module_& m) {
  m.def(
      "hidden_l2",
      [](const py::list& pairs, uintptr_t loss, uintptr_t terms, uintptr_t post_scale, int threads) {
        std::vector<HiddenL2Input> inputs;
        for (const py::handle pair : pairs) {
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
        const py::gil_scoped_release release;
        hidden_l2(inputs, address<float>(loss), address<float>(terms), address<float>(post_scale), threads);
      },
      "Weighted squared distances and gradients of all pairs: (student, teacher, gradient, sizes, weight, scale) "
      "each.");
  m.def(
      "hidden_l2_give",
      [](const py::list& gradients, int threads) {
        std::vector<HiddenL2Given> given;
        for (const py::handle gradient : gradients) {
          const auto fields = gradient.cast<py::tuple>();
          given.push_back({address<void>(fields[0].cast<uintptr_t>()), static_cast<DType>(fields[1].cast<int>()),
                           fields[2].cast<int64_t>(), fields[3].cast<float>()});
        }
        const py::gil_scoped_release release;
        hidden_l2_give(given, threads);
      },
      "Scales stored gradients in place: (address, dtype code, elements, factor) each.");
}

// (matrix, first row, rows, columns)
RowRange row_range(const py::tuple& t) {
  return RowRange{matrix(t[0].cast<py::tuple>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

void bind_nearest_neighbor(py::module_& m) {
  m.def(
      "nearest_begin", [](uintptr_t nearest, int64_t rows) { nearest_begin(address<Nearest>(nearest), rows); },
      "Nothing found yet, for (rows,) records of 16 bytes.");
  m.def(
      "nearest_centre",
      [](const py::tuple& gallery, uintptr_t centre, int threads) {
        const RowRange range = row_range(gallery);
        const py::gil_scoped_release release;
        nearest_centre(range, address<float>(centre), threads);
      },
      "The point that is taken off every row.");
  m.def(
      "nearest_norms",
      [](const py::tuple& rows, uintptr_t centre, uintptr_t norms, int threads) {
        const RowRange range = row_range(rows);
        const py::gil_scoped_release release;
        nearest_norms(range, address<const float>(centre), address<float>(norms), threads);
      },
      "Squared norms of centred rows.");
  m.def(
      "nearest_stage",
      [](const py::tuple& rows, int64_t column, int64_t width, uintptr_t centre, uintptr_t norms, float factor,
         uintptr_t out, int threads) {
        const StageArgs args{
            row_range(rows),    column, width, address<const float>(centre), address<const float>(norms), factor,
            address<float>(out)};
        const py::gil_scoped_release release;
        nearest_stage(args, threads);
      },
      "Some columns of centred rows as contiguous floats.");
  m.def(
      "nearest_scan",
      [](const py::tuple& queries, const py::tuple& gallery, uintptr_t products, uintptr_t query_norms,
         uintptr_t gallery_norms, double relative_error, double absolute_error, bool leave_one_out, uintptr_t nearest,
         int threads) {
        ScanArgs args{};
        args.queries = row_range(queries);
        args.gallery = row_range(gallery);
        args.products = address<float>(products);
        args.query_norms = address<const float>(query_norms);
        args.relative_error = relative_error;
        args.absolute_error = absolute_error;
        args.leave_one_out = leave_one_out;
        args.nearest = address<Nearest>(nearest);
        const py::gil_scoped_release release;
        nearest_scan(args, address<const float>(gallery_norms), threads);
      },
      "Brings the nearest rows up to date with one tile of products.");
  m.def(
      "nearest_finish",
      [](uintptr_t nearest, int64_t first, int64_t rows, bool leave_one_out, uintptr_t distance, uintptr_t index) {
        nearest_finish(address<const Nearest>(nearest), first, rows, leave_one_out, address<float>(distance),
                       address<int64_t>(index));
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
  // A capsule that nobody has consumed still owns its tensor; a consumer renames it "used_dltensor".
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
  bind_kd_tail(m);
  bind_give_gradient(m);
  bind_triplet_loss(m);
  bind_batch_triplet(m);
  bind_hidden_l2(m);
  bind_nearest_neighbor(m);
  m.def("pooled", &pooled, "A DLPack capsule of uninitialised memory from the pool.");
  m.def("empty_pool", &pool::empty);
  m.def("idle_pool", &pool::idle);
  m.def("level", [] { return static_cast<int>(current_level()); });
  m.def("highest_level", [] { return static_cast<int>(highest_level()); });
  m.def("set_level", [](int level) { return level >= 0 && set_level(static_cast<Level>(level)); });
}
