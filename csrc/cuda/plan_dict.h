// Devices and plans as Python's dicts, with the names that they have here.
#pragma once

#include <pybind11/pybind11.h>

#include "plan.h"

namespace bnext::cuda {

inline Device device_of(const pybind11::dict& properties) {
  const auto number = [&](const char* name) { return properties[name].cast<std::int64_t>(); };
  Device d{};
  d.multiprocessors = number("multiprocessors");
  d.shared_per_block = number("shared_per_block");
  d.shared_per_multiprocessor = number("shared_per_multiprocessor");
  d.threads_per_multiprocessor = number("threads_per_multiprocessor");
  d.l2 = number("l2");
  d.bandwidth = number("bandwidth");
  const auto clustered = properties["clustered"].cast<pybind11::sequence>();
  for (int i = 0; i < kClusterSizes; ++i) d.clustered[i] = clustered[static_cast<size_t>(i)].cast<std::int64_t>();
  d.cooperative = properties["cooperative"].cast<bool>();
  return d;
}

inline pybind11::dict as_dict(const Device& d) {
  pybind11::dict properties;
  properties["multiprocessors"] = d.multiprocessors;
  properties["shared_per_block"] = d.shared_per_block;
  properties["shared_per_multiprocessor"] = d.shared_per_multiprocessor;
  properties["threads_per_multiprocessor"] = d.threads_per_multiprocessor;
  properties["l2"] = d.l2;
  properties["bandwidth"] = d.bandwidth;
  properties["clustered"] = pybind11::make_tuple(d.clustered[0], d.clustered[1], d.clustered[2], d.clustered[3]);
  properties["cooperative"] = d.cooperative;
  return properties;
}

inline pybind11::dict as_dict(const Plan& p) {
  pybind11::dict plan;
  plan["strategy"] = name(p.strategy);
  plan["whole"] = p.whole;
  plan["planes"] = p.planes;
  plan["width"] = p.width;
  plan["slabs"] = p.slabs;
  plan["splits"] = p.splits;
  plan["threads"] = p.threads;
  plan["blocks"] = p.blocks;
  plan["held"] = p.held;
  plan["cluster"] = p.cluster;
  plan["cooperative"] = p.cooperative;
  plan["launches"] = p.launches;
  plan["shared"] = p.shared;
  plan["scratch"] = p.scratch;
  plan["read"] = p.read;
  plan["written"] = p.written;
  plan["cached"] = p.cached;
  plan["past_cache"] = p.past_cache;
  return plan;
}

}  // namespace bnext::cuda
