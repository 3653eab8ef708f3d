"""Calibration and quantization-aware training under the names that users of vendor toolchains know.

from bitwright.quantization import FakeQuantState, get_default_qconfig, prepare, set_fake_quantize
"""

from bitwright.flow.convert import QuantizedModel as QuantizedModel
from bitwright.flow.convert import convert as convert
from bitwright.flow.export import export as export
from bitwright.flow.prepare import prepare as prepare
from bitwright.numerics.lut import TableSettings as TableSettings
from bitwright.plan.qconfig import UNSET as UNSET
from bitwright.plan.qconfig import ModuleNameQconfigSetter as ModuleNameQconfigSetter
from bitwright.plan.qconfig import QConfig as QConfig
from bitwright.plan.qconfig import get_default_qconfig as get_default_qconfig
from bitwright.plan.setters import (
    calibration_4bit_weight_8bit_act_qconfig_setter as calibration_4bit_weight_8bit_act_qconfig_setter,
)
from bitwright.plan.setters import (
    calibration_8bit_weight_16bit_act_qconfig_setter as calibration_8bit_weight_16bit_act_qconfig_setter,
)
from bitwright.plan.setters import default_calibration_qconfig_setter as default_calibration_qconfig_setter
from bitwright.plan.setters import (
    default_qat_fixed_act_qconfig_setter as default_qat_fixed_act_qconfig_setter,
)
from bitwright.plan.setters import default_qat_qconfig_setter as default_qat_qconfig_setter
from bitwright.plan.setters import (
    qat_4bit_weight_8bit_act_qconfig_setter as qat_4bit_weight_8bit_act_qconfig_setter,
)
from bitwright.plan.setters import (
    qat_4bit_weight_8bit_fixed_act_qconfig_setter as qat_4bit_weight_8bit_fixed_act_qconfig_setter,
)
from bitwright.plan.setters import (
    qat_8bit_weight_16bit_act_qconfig_setter as qat_8bit_weight_16bit_act_qconfig_setter,
)
from bitwright.plan.setters import (
    qat_8bit_weight_16bit_fixed_act_qconfig_setter as qat_8bit_weight_16bit_fixed_act_qconfig_setter,
)
from bitwright.plan.setters import (
    sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter as sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter,
)
from bitwright.plan.setters import (
    sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter as sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter,
)
from bitwright.plan.setters import (
    sensitive_op_qat_8bit_weight_16bit_fixed_act_qconfig_setter as sensitive_op_qat_8bit_weight_16bit_fixed_act_qconfig_setter,
)
from bitwright.train.batchnorm import freeze_batchnorm as freeze_batchnorm
from bitwright.train.batchnorm import update_batchnorm as update_batchnorm
from bitwright.train.check import check_qat_model as check_qat_model
from bitwright.train.control import load_observer_params as load_observer_params
from bitwright.train.control import reset_scale as reset_scale
from bitwright.train.control import set_fake_quantize as set_fake_quantize
from bitwright.train.states import FakeQuantState as FakeQuantState
from bitwright.train.tables import convert_segment_lut as convert_segment_lut
from bitwright.train.tables import set_quantized_forward as set_quantized_forward
