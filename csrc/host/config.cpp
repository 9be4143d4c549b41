#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "config/compiled_arch.h"
#include "config/select.h"
#include "host/bindings.h"

namespace py = pybind11;

namespace flash::host {
namespace {

/// What forward and backward rows have in common.
template <class Config>
py::class_<Config> bind_row(py::module_& module, char const* name) {
  return py::class_<Config>(module, name)
      .def_property_readonly("name", [](Config const& row) { return std::string(row.name().text); })
      .def_readonly("arch", &Config::arch)
      .def_readonly("dtype", &Config::dtype)
      .def_readonly("head_dim", &Config::head_dim)
      .def_readonly("extras", &Config::extras)
      .def_readonly("tile_m", &Config::tile_m)
      .def_readonly("tile_n", &Config::tile_n)
      .def_readonly("num_warps", &Config::num_warps)
      .def_readonly("blocks_per_sm", &Config::blocks_per_sm)
      .def_property_readonly("num_threads", &Config::num_threads)
      .def_property_readonly("smem_bytes", &Config::smem_bytes)
      .def("__eq__", [](Config const& a, Config const& b) { return a == b; });
}

template <class Config>
void bind_selection(py::module_& module, char const* name) {
  py::class_<Selection<Config>>(module, name)
      .def_readonly("row", &Selection<Config>::row)
      .def_readonly("found", &Selection<Config>::found)
      .def_readonly("why_not", &Selection<Config>::why_not);
}

/// What forward and backward rows of the sm90 family have in common.
template <class Config>
py::class_<Config> bind_sm90_row(py::module_& module, char const* name) {
  return py::class_<Config>(module, name)
      .def_property_readonly("name", [](Config const& row) { return std::string(row.name().text); })
      .def_readonly("dtype", &Config::dtype)
      .def_readonly("head_dim", &Config::head_dim)
      .def_readonly("head_dim_v", &Config::head_dim_v)
      .def_readonly("options", &Config::extras)
      .def_property_readonly("extras",
                             [](Config const& row) { return row.extras != Extras::kNone; })
      .def_readonly("tile_m", &Config::tile_m)
      .def_readonly("tile_n", &Config::tile_n)
      .def_property_readonly("num_threads", &Config::num_threads)
      .def_property_readonly("smem_bytes", &Config::smem_bytes)
      .def("__eq__", [](Config const& a, Config const& b) { return a == b; });
}

/// Options of a problem for which kernels with `extras` are meant, and a bias.
template <class Params>
void set_options(Params& params, Extras extras, bool bias) {
  static float element = 0.f;
  static int64_t state = 0;
  auto const has = [&](Extras option) { return extras == option || extras == Extras::kAny; };
  params.scores.softcap = has(Extras::kSoftcap) ? 1.f : 0.f;
  params.scores.alibi_slopes = has(Extras::kAlibi) ? &element : nullptr;
  params.scores.bias.ptr = bias ? &element : nullptr;
  params.dropout.rng_state = has(Extras::kDropout) ? &state : nullptr;
}

void bind_sm90_forward(py::module_& module) {
  using Config = Sm90ForwardConfig;
  py::enum_<MaskClass>(module, "MaskClass")
      .value("none", MaskClass::kNone)
      .value("bounded", MaskClass::kBounded);
  bind_sm90_row<Config>(module, "Sm90ForwardConfig")
      .def_readonly("mask", &Config::mask)
      .def_readonly("max_seqlen_q", &Config::max_seqlen_q)
      .def_readonly("q_stages", &Config::q_stages)
      .def_readonly("k_stages", &Config::k_stages)
      .def_readonly("v_stages", &Config::v_stages)
      .def_readonly("out_in_v", &Config::out_in_v)
      .def_readonly("ping_pong", &Config::ping_pong)
      .def_readonly("rows_in_turn", &Config::rows_in_turn);
  module.def("sm90_forward_rows", sm90_forward_rows);
  module.def(
      "select_sm90_forward",
      [](DType dtype, int seqlen_q, int seqlen_k, int head_dim, int head_dim_v, Mask mask,
         int smem_bytes, Extras extras, bool bias, int batch_size, int max_seqlen_q) {
        static int32_t border = 0;
        Shape const shape{.batch_size = imax(batch_size, 1),
                          .seqlen_q = seqlen_q,
                          .seqlen_k = seqlen_k,
                          .num_heads = 1,
                          .num_heads_k = 1,
                          .head_dim = head_dim,
                          .head_dim_v = head_dim_v};
        ForwardParams params{};
        params.shape = shape;
        params.mask = mask;
        params.max_seqlen_q = max_seqlen_q;
        params.sequences.cu_seqlens_q = batch_size > 0 ? &border : nullptr;
        set_options(params, extras, bias);
        return select_sm90_forward(dtype, params, smem_bytes);
      },
      py::return_value_policy::reference,
      "A row, or None; of batch_size packed sequences unless that is 0.", py::arg("dtype"),
      py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("head_dim"), py::arg("head_dim_v"),
      py::arg("mask"), py::arg("smem_bytes"), py::arg("extras") = Extras::kNone,
      py::arg("bias") = false, py::arg("batch_size") = 0, py::arg("max_seqlen_q") = 0);
}

void bind_sm90_backward(py::module_& module) {
  bind_sm90_row<Sm90BackwardConfig>(module, "Sm90BackwardConfig")
      .def_readonly("dout_stages", &Sm90BackwardConfig::dout_stages)
      .def_readonly("landing_strips", &Sm90BackwardConfig::landing_strips);
  module.def("sm90_backward_rows", sm90_backward_rows);
  module.def(
      "select_sm90_backward",
      [](DType dtype, int head_dim, int head_dim_v, int smem_bytes, Extras extras, bool bias) {
        BackwardParams params{};
        params.shape.head_dim = head_dim;
        params.shape.head_dim_v = head_dim_v;
        set_options(params, extras, bias);
        return select_sm90_backward(dtype, params, smem_bytes);
      },
      py::return_value_policy::reference, "A row, or None.", py::arg("dtype"), py::arg("head_dim"),
      py::arg("head_dim_v"), py::arg("smem_bytes"), py::arg("extras") = Extras::kNone,
      py::arg("bias") = false);
}

}  // namespace

void bind_config(py::module_& module) {
  py::enum_<Extras>(module, "Extras")
      .value("none", Extras::kNone)
      .value("softcap", Extras::kSoftcap)
      .value("alibi", Extras::kAlibi)
      .value("dropout", Extras::kDropout)
      .value("any", Extras::kAny);
  py::enum_<DType>(module, "DType")
      .value("fp16", DType::kFp16)
      .value("bf16", DType::kBf16)
      .value("fp32", DType::kFp32);
  bind_row<ForwardConfig>(module, "ForwardConfig");
  bind_row<BackwardConfig>(module, "BackwardConfig")
      .def_readonly("warps_m_s", &BackwardConfig::warps_m_s)
      .def_readonly("warps_n_dkv", &BackwardConfig::warps_n_dkv)
      .def_readonly("warps_m_dq", &BackwardConfig::warps_m_dq)
      .def_readonly("num_stages", &BackwardConfig::num_stages);
  bind_sm90_forward(module);
  bind_sm90_backward(module);
  bind_selection<ForwardConfig>(module, "ForwardSelection");
  bind_selection<BackwardConfig>(module, "BackwardSelection");
  py::class_<KernelRequest>(module, "KernelRequest")
      .def(py::init<int, DType, int, bool, int>(), py::arg("compute_capability"), py::arg("dtype"),
           py::arg("head_dim"), py::arg("extras"), py::arg("smem_bytes"));
  module.def("compiled_arch", compiled_arch, py::arg("archs"), py::arg("compute_capability"));
  module.def("forward_rows", forward_rows);
  module.def("backward_rows", backward_rows);
  module.def("select_forward", select_forward);
  module.def("select_backward", select_backward);
}

}  // namespace flash::host
