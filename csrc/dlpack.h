// The part of the DLPack ABI (unversioned, stable) that hands a pooled buffer to torch.
#pragma once

#include <cstdint>

extern "C" {

typedef struct {
  int32_t device_type;  // 1: CPU
  int32_t device_id;
} DLDevice;

typedef struct {
  uint8_t code;  // 2: float, 4: bfloat
  uint8_t bits;
  uint16_t lanes;
} DLDataType;

typedef struct {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(struct DLManagedTensor* self);
} DLManagedTensor;
}
