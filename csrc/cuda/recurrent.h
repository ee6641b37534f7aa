// Launchers of the recurrent steps; each returns a cudaError_t.
#pragma once

#include "../recurrent_shape.h"

extern "C" {
int ff_lstm_step_float(const fastfisher::LstmStep<float>* step, void* stream);
int ff_lstm_step_double(const fastfisher::LstmStep<double>* step, void* stream);
int ff_lstm_step_backward_float(const fastfisher::LstmStepBackward<float>* step, void* stream);
int ff_lstm_step_backward_double(const fastfisher::LstmStepBackward<double>* step, void* stream);
int ff_gru_step_float(const fastfisher::GruStep<float>* step, void* stream);
int ff_gru_step_double(const fastfisher::GruStep<double>* step, void* stream);
int ff_gru_step_backward_float(const fastfisher::GruStepBackward<float>* step, void* stream);
int ff_gru_step_backward_double(const fastfisher::GruStepBackward<double>* step, void* stream);
}
