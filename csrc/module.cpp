// kdkernels._native: the launchers as Python functions over addresses. Sizes, strides and dtypes are checked by the
// caller (kdkernels/<op>/op.py) before any address crosses over. Every kernel runs without the GIL.
#include <pybind11/pybind11.h>

#include "level.h"
#include "ops.h"

namespace py = pybind11;

namespace {

template <typename T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// (address, dtype code, row stride, column stride), strides in elements
Matrix matrix(const py::tuple& t) {
  return Matrix{address<const void>(t[0].cast<uintptr_t>()), static_cast<DType>(t[1].cast<int>()),
                t[2].cast<int64_t>(), t[3].cast<int64_t>()};
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
}

void bind_give_gradient(py::module_& m) {
  m.def(
      "give_gradient",
      [](uintptr_t data, int dtype, int64_t rows, int64_t columns, float factor, uintptr_t per_row,
         int64_t per_row_stride, int threads) {
        const GiveGradientArgs args{address<void>(data), static_cast<DType>(dtype),  rows,          columns, factor,
                                    address<const float>(per_row), per_row_stride};
        const py::gil_scoped_release release;
        give_gradient(args, threads);
      },
      "Scales a stored gradient in place.");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  bind_kd_cross_entropy(m);
  bind_give_gradient(m);
  m.def("level", [] { return static_cast<int>(current_level()); });
  m.def("highest_level", [] { return static_cast<int>(highest_level()); });
  m.def("set_level", [](int level) { return level >= 0 && set_level(static_cast<Level>(level)); });
}
